"""optimizer.pt and training_args.bin that the Trainer saved with an earlier version load as they were."""

import pytest
import torch
from data.make_checkpoints import make_trainer
from launch_helpers import TESTS
from transformers import TrainingArguments

from hf_mars import MarsAdamW

EVERY_FOLDER = pytest.mark.parametrize(
    "folder", sorted((TESTS / "data" / "checkpoints").glob("*/trainer")), ids=lambda folder: folder.parent.name
)


@EVERY_FOLDER
def test_the_optimizers_state(folder, tmp_path):
    trainer = make_trainer(str(tmp_path))
    trainer.create_optimizer()
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    trainer.optimizer.load_state_dict(saved)
    loaded = trainer.optimizer.state_dict()
    assert type(trainer.optimizer) is MarsAdamW
    assert len(saved["state"]) == len(list(trainer.model.parameters()))
    assert loaded["state"].keys() == saved["state"].keys()
    for index, state in saved["state"].items():
        assert loaded["state"][index].keys() == state.keys()
        assert all(torch.equal(loaded["state"][index][key], value) for key, value in state.items())
        assert state["step"] == 3
    for group, wanted in zip(loaded["param_groups"], saved["param_groups"], strict=True):
        assert {key: group[key] for key in wanted} == wanted
        # Today's defaults of what make_trainer() leaves open, and their meaning of an lr_1d, are not put in.
        assert (group["gamma"], group["max_norm"]) in ((0.05, 1.0), (0.0, None))
        assert group["adjust_lr_fn"] == "original"


@EVERY_FOLDER
def test_the_training_arguments(folder):
    args = torch.load(folder / "training_args.bin", weights_only=False)
    assert isinstance(args, TrainingArguments)
    assert args.optim == "mars_adamw" and args.optim.value == "mars_adamw"
    assert (args.optim_args, args.learning_rate, args.max_steps) == ("gamma=0.05,lr_1d=2e-3", 1e-2, 3)
