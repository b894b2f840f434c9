"""A Trainer's optimizer skips a step whose gradient is not finite, by the norm that the Trainer measures anyway."""

import logging
import math

import pytest
import torch
from helpers import NAMES
from trainer_helpers import make_trainer
from transformers import Trainer, TrainerCallback

from hf_mars import MarsTrainer
from hf_mars.trainer.callbacks import mars_optimizer
from hf_mars.trainer.skipping import NotFiniteError

SPOILT = "transformer.h.0.mlp.c_fc.weight"


class Spoiler(TrainerCallback):
    """Makes one element of one gradient bad in the updates `at`; keeps what each update begins and ends with."""

    def __init__(self, at, bad=math.nan, name=SPOILT):
        self.at, self.bad, self.name = at, bad, name
        self.before, self.after, self.lrs = {}, {}, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.state = state
        dict(model.named_parameters())[self.name].register_hook(self.spoil)

    def spoil(self, grad):
        if self.state.global_step + 1 in self.at:
            grad = grad.clone()
            grad.view(-1)[3] = self.bad
        return grad

    def snapshot(self, model, optimizer):
        state = mars_optimizer(optimizer).state
        params = list(model.parameters())
        return [p.detach().clone() for p in params] + [
            value.clone() for p in params for value in state.get(p, {}).values()
        ]

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.before[state.global_step + 1] = self.snapshot(model, optimizer)

    def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        self.after[state.global_step] = self.snapshot(model, optimizer)
        self.lrs.append(lr_scheduler.get_last_lr()[0])


def changed(spoiler, step):
    before, after = spoiler.before[step], spoiler.after[step]
    return len(before) != len(after) or any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize(
    "cls, optim_args", [(Trainer, "gamma=0.3"), (MarsTrainer, "gamma=0.3"), (MarsTrainer, "gamma=0.3,exact=true")]
)
@pytest.mark.parametrize("optim", NAMES)
def test_a_bad_step_changes_nothing(optim, cls, optim_args, max_grad_norm, tmp_path):
    """In the middle and at the beginning, with accumulation; the schedule goes on."""
    spoiler = Spoiler(at=(1, 4))
    trainer = make_trainer(
        tmp_path,
        cls,
        optim=optim,
        optim_args=optim_args,
        max_grad_norm=max_grad_norm,
        gradient_accumulation_steps=2,
        lr_scheduler_type="linear",
        callbacks=[spoiler],
    )
    trainer.train()
    assert [step for step in range(1, 7) if not changed(spoiler, step)] == [1, 4]
    assert mars_optimizer(trainer.optimizer).skipped_steps == 2
    assert len(set(spoiler.lrs)) == 6
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_skipped_steps_are_logged(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[Spoiler(at=(2, 3, 5))])
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["mars/skipped_steps"] for row in rows] == [0, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("cls", [MarsTrainer, Trainer])
def test_too_many_in_a_row_end_the_training(cls, max_grad_norm, tmp_path):
    """Where the Trainer logs, with the name of the tensor: here at step 6, after 3, 4 and 5."""
    trainer = make_trainer(
        *(tmp_path, cls),
        max_skipped_steps=4,
        max_steps=12,
        logging_steps=3,
        max_grad_norm=max_grad_norm,
        callbacks=[Spoiler(at=range(3, 13))],
    )
    with pytest.raises(NotFiniteError, match=f"step 6: 4 steps in a row .*max_skipped_steps=4.*{SPOILT}$"):
        trainer.train()
    assert trainer.state.global_step == 5


@pytest.mark.parametrize("cls", [MarsTrainer, Trainer])
def test_too_many_in_a_row_are_noticed_at_a_save_and_at_the_end(cls, tmp_path):
    """Where nothing is logged before: no checkpoint is written."""
    settings = {"max_skipped_steps": 4, "logging_steps": 500}
    spoiler = Spoiler(at=range(2, 9))
    trainer = make_trainer(tmp_path / "a", cls, save_strategy="steps", save_steps=5, callbacks=[spoiler], **settings)
    with pytest.raises(NotFiniteError, match=f"step 5: 4 steps in a row .*max_skipped_steps=4.*{SPOILT}$"):
        trainer.train()
    trainer = make_trainer(tmp_path / "b", cls, max_steps=8, callbacks=[Spoiler(at=range(2, 9))], **settings)
    with pytest.raises(NotFiniteError, match=f"step 8: 7 steps in a row .*{SPOILT}$"):
        trainer.train()
    assert not [*tmp_path.glob("*/checkpoint-*")]


class At(TrainerCallback):
    """Saves after a step, or stops there, as nobody could know before."""

    def __init__(self, step, name):
        self.step, self.name = step, name

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            setattr(control, self.name, True)


@pytest.mark.parametrize("wish", ["should_save", "should_training_stop"])
@pytest.mark.parametrize("cls", [MarsTrainer, Trainer])
def test_a_save_or_an_end_that_nobody_foresaw(cls, wish, tmp_path):
    spoiler = Spoiler(at=range(1, 13))
    trainer = make_trainer(tmp_path, cls, max_steps=50, logging_steps=500, callbacks=[spoiler, At(12, wish)])
    with pytest.raises(NotFiniteError, match=r"step 12: 12 steps in a row .*max_skipped_steps=10.*not finite$"):
        trainer.train()
    assert not [*tmp_path.glob("checkpoint-*")]


@pytest.mark.parametrize("cls", [MarsTrainer, Trainer])
def test_fewer_are_told_of_at_a_save_and_at_the_end(cls, tmp_path, caplog):
    """Once each, where nothing is logged in between."""
    settings = {"logging_steps": 500, "save_strategy": "steps", "save_steps": 3}
    trainer = make_trainer(tmp_path, cls, max_steps=8, callbacks=[Spoiler(at=(2, 3, 8))], **settings)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    told = [record.getMessage() for record in caplog.records if "changed nothing" in record.getMessage()]
    assert [message[: message.index(" changed")] for message in told] == ["step 3: 2 steps", "step 8: 3 steps"]


def test_fewer_or_with_good_ones_between_do_not(tmp_path):
    trainer = make_trainer(tmp_path, max_skipped_steps=3, max_steps=9, callbacks=[Spoiler(at=(2, 3, 5, 6, 8))])
    trainer.train()
    assert mars_optimizer(trainer.optimizer).skipped_steps == 5


@pytest.mark.parametrize("value", [0, -1])
def test_max_skipped_steps_is_checked(value, tmp_path):
    with pytest.raises(ValueError, match=f"max_skipped_steps must be at least 1, got {value}"):
        make_trainer(tmp_path, max_skipped_steps=value)


@pytest.mark.parametrize("optim", NAMES)
def test_a_momentum_that_is_not_finite_is_an_error(optim, tmp_path):
    """Whatever made it so: sign(NaN) is 0, and a MARS-Lion would stand still with healthy logs."""

    class SpoilMomentum(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == 2:
                param = dict(model.named_parameters())[SPOILT]
                mars_optimizer(optimizer).state[param]["exp_avg"].view(-1)[0] = math.nan

    trainer = make_trainer(tmp_path, optim=optim, callbacks=[SpoilMomentum()])
    with pytest.raises(NotFiniteError, match=f"step 3: the momentum of {SPOILT} is not finite"):
        trainer.train()
