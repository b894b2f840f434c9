"""The log that a Trainer writes of its run: losses as they are, the clock of training alone."""

import json
import math
import time

import pytest
import torch
from helpers import tiny_gpt2
from trainer_helpers import losses, make_trainer, token_blocks, weights
from transformers import Trainer, TrainerCallback

from hf_mars.sweep.curves import read_log
from hf_mars.trainer.run_log import RunLog

SETTINGS = {"optim": "adamw_torch", "max_steps": 6, "logging_steps": 3}


@pytest.fixture
def log(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    path.touch()
    monkeypatch.setenv("HF_MARS_SWEEP_LOG", str(path))
    return path


def trained(folder, *callbacks, **settings):
    torch.manual_seed(0)
    trainer = make_trainer(folder, Trainer, model=tiny_gpt2(), callbacks=list(callbacks), **{**SETTINGS, **settings})
    trainer.train()
    return trainer


def test_every_step_of_a_short_training_is_logged_and_nothing_else_changes(tmp_path, log):
    trainer, alone = trained(tmp_path, RunLog()), trained(tmp_path)
    found = read_log(log)
    assert found["begin"]["initial"] == pytest.approx(sum(p.sum().item() for p in tiny_gpt2().parameters()), rel=1e-4)
    assert [(p.step, p.loss) for p in found["training"]] == list(enumerate(losses(trainer), 1)) and found["end"] == 6
    assert losses(alone) == pytest.approx([sum(losses(trainer)[:3]) / 3, sum(losses(trainer)[3:]) / 3], rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer), weights(alone), strict=True))


def test_what_is_known_of_a_run(tmp_path, log):
    trainer = trained(tmp_path, RunLog(), include_num_input_tokens_seen=True)
    found = read_log(log)
    count = sum(p.numel() for p in trainer.model.parameters())
    # AdamW's two moments, and a step count of four bytes for each tensor.
    assert found["state_bytes"] == 8 * count + 4 * len(list(trainer.model.parameters()))
    assert found["begin"]["parameters"] == count and found["begin"]["max_steps"] == 6
    assert found["begin"]["versions"]["torch"] == torch.__version__
    assert found["begin"]["hardware"]["device"] == "cpu" and found["begin"]["hardware"]["processes"] == 1
    assert [p.tokens for p in found["training"]] == [4 * 12 * step for step in range(1, 7)]


class Slow(TrainerCallback):
    """A second of evaluating, or of saving, each time, and a fifth of one for the steps together."""

    def on_prediction_step(self, *args, **kwargs):
        time.sleep(0.5)  # two batches

    def on_save(self, *args, **kwargs):
        time.sleep(1)

    def on_step_begin(self, *args, **kwargs):
        time.sleep(0.2 / 6)


@pytest.mark.parametrize("what", ["eval", "save"])
def test_the_clock_is_that_of_training(tmp_path, log, what):
    settings = {f"{what}_strategy": "steps", f"{what}_steps": 2, "per_device_eval_batch_size": 4}
    began = time.monotonic()
    # RunLog is the last callback of a Trainer that python -m hf_mars gave it to.
    trainer = trained(tmp_path, Slow(), RunLog(), **settings)
    assert time.monotonic() - began > 3
    found = read_log(log)
    assert 0.2 < found["training"][-1].seconds < 2
    if what == "eval":
        rows = [(row["step"], row["eval_loss"]) for row in trainer.state.log_history if "eval_loss" in row]
        assert [(p.step, p.loss) for p in found["evaluation"]] == rows and len(rows) == 3
        trainer.evaluate()
        assert len(read_log(log)["evaluation"]) == 3
        assert read_log(log)["evaluation"][-1].seconds == pytest.approx(found["evaluation"][-1].seconds, abs=1)


def test_losses_that_are_no_numbers_stay_so(tmp_path, log):
    """transformers would log them as 0, the best loss of all."""

    class Diverges(Trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * math.nan if self.state.global_step >= 3 else loss

    torch.manual_seed(0)
    make_trainer(tmp_path, Diverges, model=tiny_gpt2(), callbacks=[RunLog()], **SETTINGS).train()
    assert [math.isnan(p.loss) for p in read_log(log)["training"]] == [False] * 3 + [True] * 3


def test_several_evaluation_sets_and_the_last_training_count(tmp_path, log):
    settings = {**SETTINGS, "eval_strategy": "steps", "eval_steps": 3}
    trainer = make_trainer(tmp_path, Trainer, callbacks=[RunLog()], **settings)
    trainer.evaluate()  # before any training
    assert read_log(log) == {}
    trainer.train()
    trainer.eval_dataset = {"x": token_blocks(4, 1), "y": token_blocks(4, 2)}
    trainer.train()
    rows = [row for row in trainer.state.log_history if row["step"] == 6]
    both = [row[key] for row in rows for key in ("eval_x_loss", "eval_y_loss") if key in row]
    evaluation = read_log(log)["evaluation"]
    assert [p.step for p in evaluation] == [3, 6] and evaluation[-1].loss == pytest.approx(sum(both) / 2)


def test_half_a_line_of_a_killed_run(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"begin": {}}) + '\n{"step": 1, "loss": 2.0, "seconds": 1}\n{"step": 2, "lo')
    assert [p.loss for p in read_log(path)["training"]] == [2.0]


def test_a_run_whose_sweep_has_given_it_up_ends(tmp_path, log):
    class Remove(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                log.unlink()

    with pytest.raises(SystemExit, match=r"log.jsonl is gone: the sweep that began this run has given it up"):
        trained(tmp_path, Remove(), RunLog())
    assert not log.exists()
