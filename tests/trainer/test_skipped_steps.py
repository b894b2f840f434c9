"""A Trainer's optimizer skips a step whose gradient is not finite, by the norm that the Trainer measures anyway."""

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
