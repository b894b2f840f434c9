"""MarsTrainer takes the clip along in the step where that is safe, and says where it does not."""

import functools
import math

import pytest
import torch
from helpers import EVERY_METHOD, tiny_gpt2
from trainer_helpers import NO_DROPOUT, MarsTrainer, Trainer, make_trainer, optimizer_of, train, weights
from transformers import TrainerCallback

from hf_mars.trainer import clipping

FUSED = pytest.mark.parametrize("optim", ["mars_adamw", "mars_lion"])


class Gradients(MarsTrainer):
    """Notes, when step() begins, how much of a unit each tensor's gradient was changed by the clip."""

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        self.before, self.written = {}, []
        ours = optimizer_of(self)
        ours._step = functools.partial(self._compare, ours._step)  # a hook would make torch clip
        return optimizer

    def _clip_grad_norm(self, model):
        self.before = {p: p.grad.clone() for p in model.parameters()}
        return super()._clip_grad_norm(model)

    def _compare(self, step, *args):
        self.written.append(any(not torch.equal(p.grad, grad) for p, grad in self.before.items()))
        step(*args)


def logged(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def assert_close_runs(left, right):
    assert logged(left, "grad_norm") == pytest.approx(logged(right, "grad_norm"), rel=1e-5)
    assert logged(left, "loss") == pytest.approx(logged(right, "loss"), rel=1e-4)


@FUSED
@pytest.mark.parametrize("max_grad_norm", [0.1, 100.0])
def test_gradients_are_not_written_to(max_grad_norm, optim, tmp_path):
    trainer = train(tmp_path, Gradients, optim=optim, max_grad_norm=max_grad_norm)
    assert trainer.written == [False] * 6 and not trainer.clipping.reasons
    assert_close_runs(trainer, train(tmp_path, optim=optim, max_grad_norm=max_grad_norm, fuse_clip=False))


@EVERY_METHOD
def test_without_it_the_run_is_the_stock_trainers(method, tmp_path):
    runs = [train(tmp_path, cls, optim=method, max_grad_norm=0.1, fuse_clip=False) for cls in (MarsTrainer, Trainer)]
    assert all(torch.equal(a, b) for a, b in zip(*map(weights, runs), strict=True))
    assert logged(runs[0], "grad_norm") == logged(runs[1], "grad_norm")


def test_the_norm_without_a_clip_takes_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", None)
    trainer = make_trainer(tmp_path, max_grad_norm=0.0)
    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", None)
    trainer.train()
    assert len(logged(trainer, "grad_norm")) == 6 and all(map(math.isfinite, logged(trainer, "grad_norm")))


def test_diagnostics_are_those_of_clipped_gradients(tmp_path):
    fused, first = (train(tmp_path, max_grad_norm=0.1, fuse_clip=choice) for choice in (True, False))
    for key in ("mars/correction_ratio", "mars/gradient_cosine"):
        assert logged(fused, key) == pytest.approx(logged(first, key), rel=1e-3), key


class Looks(TrainerCallback):
    def on_pre_optimizer_step(self, *args, **kwargs):
        pass


class LooksLate(TrainerCallback):
    def on_optimizer_step(self, *args, **kwargs):
        """Gradients are still there."""


def an_instance_that_looks():
    callback = TrainerCallback()
    callback.on_pre_optimizer_step = lambda *args, **kwargs: None
    return callback


class Measures(MarsTrainer):
    def _get_grad_norm(self, *args, **kwargs):
        return super()._get_grad_norm(*args, **kwargs)


class Hooked(MarsTrainer):
    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer_of(self).register_step_pre_hook(halve)
        return optimizer


def halve(optimizer, args, kwargs):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad.mul_(0.5)


def unfreeze_behind_the_optimizer(trainer):
    """A parameter that requires gradients and that no optimizer has."""
    trainer.create_optimizer()
    group = optimizer_of(trainer).param_groups[0]
    group["params"] = group["params"][1:]


REASONS = {
    "fuse_clip=False": {"fuse_clip": False},
    "exact mode clips two gradients": {"optim_args": "exact=true"},
    "Newton–Schulz is composed of torch's kernels": {"optim": "mars_shampoo"},
    "foreach=True, fused=False": {"optim_args": "foreach=true,fused=false"},
    "plain AdamW is torch's": {"optim_args": "gamma=0"},
    "the compiled step takes float32 alone": {"optim_args": "state_dtype=bfloat16"},
    "Looks.on_pre_optimizer_step may look at clipped gradients": {"callbacks": [Looks()]},
    "LooksLate.on_optimizer_step may look at clipped gradients": {"callbacks": [LooksLate()]},
    "TrainerCallback.on_pre_optimizer_step may look at clipped gradients": {"callbacks": [an_instance_that_looks()]},
    "Measures._get_grad_norm may look at clipped gradients": {"cls": Measures},
    "the hook halve of step() may look at clipped gradients": {"cls": Hooked},
}


@pytest.mark.parametrize("reason", REASONS)
def test_the_log_says_once_why_torch_clips(reason, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(clipping.logger, "info", lines.append)
    trainer = train(tmp_path, max_steps=3, **REASONS[reason])
    assert trainer.clipping.reasons == [reason]
    assert lines == [f"gradients are clipped by torch.nn.utils.clip_grad_norm_, in passes of its own: {reason}"]


def test_a_hook_that_writes_gradients_gives_the_stock_trainers_run(tmp_path):
    class Stock(Trainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            optimizer_of(self).register_step_pre_hook(halve)
            return optimizer

    runs = [train(tmp_path, cls, max_grad_norm=0.1) for cls in (Hooked, Stock)]
    assert all(torch.equal(a, b) for a, b in zip(*map(weights, runs), strict=True))


def test_the_log_of_a_run_without_a_clip(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(clipping.logger, "info", lines.append)
    train(tmp_path, max_steps=2, max_grad_norm=0.0, fuse_clip=False)
    assert lines == ["the norm of the gradients is measured by torch, in a pass of its own: fuse_clip=False"]


def test_parameters_that_the_optimizer_has_not(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    unfreeze_behind_the_optimizer(trainer)
    trainer.train()
    assert trainer.clipping.reasons == ["the parameters that require gradients are not those of the optimizer"]


def test_the_compiled_step_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mars.optim.kernels.cpu._cpu", None)
    assert train(tmp_path, max_steps=2).clipping.reasons == ["the compiled step is missing"]


def test_a_gradient_that_is_not_finite_skips_the_step(tmp_path):
    class Spoilt(MarsTrainer):
        def training_step(self, model, *args):
            loss = super().training_step(model, *args)
            if self.state.global_step == 2:
                next(model.parameters()).grad.view(-1)[0] = math.nan
            return loss

    trainer = train(tmp_path, Spoilt, model=tiny_gpt2(**NO_DROPOUT))
    assert optimizer_of(trainer).skipped_steps == 1 and not trainer.clipping.reasons
    assert all(w.isfinite().all() for w in weights(trainer))
