"""MARS in the Trainer: the same run in every Trainer, the Trainer's groups, and resuming."""

import pytest
import torch
from helpers import NAMES, assert_close, assert_equal, tiny_gpt2, tiny_llama
from trainer_helpers import NO_DROPOUT, losses, make_trainer, optimizer_of, token_blocks, train, weights
from transformers import Trainer, TrainingArguments

from hf_mars import MarsAdamW, MarsTrainer, MarsTrainingArguments, param_groups


@pytest.mark.parametrize("optim", NAMES)
def test_stock_trainer_and_mars_trainer_give_the_same_run(tmp_path, optim):
    settings = {"optim": optim, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    stock, mars = (train(tmp_path, cls, **settings) for cls in (Trainer, MarsTrainer))
    assert losses(stock) == losses(mars)
    assert_equal(weights(mars), weights(stock))


@pytest.mark.parametrize("optim", NAMES)
@pytest.mark.parametrize("optim_args", ["", "exact=true,max_norm=1.0", "max_norm=1.0"])
def test_resuming_is_bit_exact(tmp_path, optim, optim_args):
    """With dropout and gradient accumulation, over an epoch's end, from the middle of an epoch."""
    settings = {"optim": optim, "optim_args": optim_args, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    settings |= {"max_steps": 7, "save_strategy": "steps", "save_steps": 3}
    whole = train(tmp_path, **settings)
    resumed = train(tmp_path, resume=str(tmp_path / "checkpoint-3"), **settings)
    assert resumed.state.global_step == 7
    assert losses(whole)[3:] == losses(resumed)[3:]
    assert_equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("make_model", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("optim", NAMES)
def test_groups_follow_the_trainers_decay_and_the_models_modules(tmp_path, make_model, optim):
    """The Trainer path gives every parameter the decay, kind and layout that param_groups gives it."""
    model = make_model()
    trainer = make_trainer(tmp_path, model=model, optim=optim)
    groups = trainer.create_optimizer().param_groups
    expected = type(trainer.optimizer)(param_groups(model, weight_decay=0.1)).param_groups
    keys = ["weight_decay", "update"] + (["kind", "layout"] if optim in ("mars_shampoo", "mars_m") else [])

    def described(param_groups):
        return {id(p): [group[key] for key in keys] for group in param_groups for p in group["params"]}

    assert described(groups) == described(expected)
    assert len(described(groups)) == len(list(model.parameters()))
    assert groups[0]["kind"] == "matrix" and groups[0]["lr"] == trainer.args.learning_rate


def test_a_subclass_decides_what_decays(tmp_path):
    class UndecayedTrainer(Trainer):
        def get_decay_parameter_names(self, model):
            return []

    optimizer = make_trainer(tmp_path, UndecayedTrainer, optim="mars_shampoo").create_optimizer()
    groups = [group for group in optimizer.param_groups if group["params"]]
    assert {group["weight_decay"] for group in groups} == {0.0}
    assert {group["layout"] for group in groups if group["update"] == "shampoo"} == {"in_out"}


def test_schedulers_scale_both_learning_rates(tmp_path):
    trainer = train(tmp_path, optim_args="lr_1d=1e-3", lr_scheduler_type="linear", max_steps=4)
    lrs = {group["kind"]: group["lr"] for group in optimizer_of(trainer).param_groups}
    assert lrs == {"matrix": 0.0, "1d": 0.0}
    logged = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert logged == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])


def test_every_optimizer_of_transformers_still_works(tmp_path):
    stock, mars = (train(tmp_path, cls, optim="adamw_torch", max_steps=3) for cls in (Trainer, MarsTrainer))
    assert isinstance(optimizer_of(mars), torch.optim.AdamW)
    assert_equal(weights(mars), weights(stock))


def test_defaults_without_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = MarsTrainer(tiny_gpt2())
    assert isinstance(trainer.args, MarsTrainingArguments)
    assert isinstance(trainer.create_optimizer(), MarsAdamW)


def test_optimizer_state_loads_with_weights_only(tmp_path):
    train(tmp_path, save_strategy="steps", save_steps=3)
    saved = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert {"exp_avg", "exp_avg_sq", "last_grad", "step"} in [set(state) for state in saved["state"].values()]


class OnTwoCpus(torch.nn.Module):
    """torch.nn.DataParallel as far as it goes without GPUs: each half of a batch through the module, both losses
    gathered. The replicas are the module itself, whose parameters collect the gradients of both as they do there."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        halves = zip(*(tensor.chunk(2) for tensor in inputs.values()), strict=True)
        outputs = [self.module(**dict(zip(inputs, half, strict=True))) for half in halves]
        return {key: torch.stack([output[key] for output in outputs]) for key in ("loss",)}


def weights_with_gradients(trainer):
    """All but the keys' biases, which softmax does not see: their gradients are rounding errors."""
    named = zip([name for name, _ in trainer.model.named_parameters()], weights(trainer), strict=True)
    return [torch.cat(w.chunk(3)[::2]) if name.endswith("c_attn.bias") else w for name, w in named]


@pytest.mark.parametrize("optim", NAMES)
@pytest.mark.parametrize("optim_args", ["", "max_norm=1.0"])
def test_several_gpus_in_one_process(tmp_path, optim, optim_args, monkeypatch):
    """What the Trainer does on a machine with two GPUs where no launcher was used, but for the GPUs."""
    settings = {"optim": optim, "optim_args": optim_args, "learning_rate": 1e-3, "max_steps": 4}
    settings["train_dataset"] = [{**block, "labels": block["input_ids"]} for block in token_blocks()]
    alone = train(tmp_path, Trainer, model=tiny_gpt2(**NO_DROPOUT), **settings)
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    monkeypatch.setattr(torch.nn, "DataParallel", OnTwoCpus)
    settings["per_device_train_batch_size"] = 2
    several = train(tmp_path, Trainer, model=tiny_gpt2(**NO_DROPOUT), **settings)
    assert type(several.model_wrapped) is OnTwoCpus and several.args.train_batch_size == 4
    assert losses(several) == pytest.approx(losses(alone), rel=1e-5)
    assert_close(*(weights_with_gradients(trainer) for trainer in (several, alone)), 1e-4)
