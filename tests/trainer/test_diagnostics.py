"""What MARS did, beside the logged loss: right values, at logging steps alone, for every reporter."""

import json
import math
import sys
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

import pytest
import torch
from helpers import EVERY_METHOD, PAPER, assert_equal, make, make_gradients, make_params, tiny_gpt2
from launch_helpers import launch
from trainer_helpers import make_trainer, optimizer_of, token_blocks, train, weights
from transformers import Trainer, TrainerCallback

from hf_mars import MarsDiagnosticsCallback, MarsTrainer
from hf_mars.optim import MarsAdamW, MarsLion
from hf_mars.optim.diagnostics import step_diagnostics
from hf_mars.trainer import callbacks

MEASURED = {"mars/correction_ratio", "mars/gradient_cosine", "mars/clipped_fraction"}
RATES = {"mars/lr_matrix", "mars/lr_1d"}
SKIPPED = "mars/skipped_steps"  # known always
SETTINGS = {"gradient_accumulation_steps": 2, "learning_rate": 1e-3, "max_grad_norm": 0.4}


class Recorder(TrainerCallback):
    """Keeps each step's gradients, as the optimizer gets them, and learning rates, by name of the parameter."""

    def __init__(self):
        self.grads, self.rates = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.grads.append({name: p.grad.double().clone() for name, p in model.named_parameters()})
        self.rates.append({group["kind"]: group["lr"] for group in optimizer.param_groups if group["params"]})


def total(tensors):
    return math.sqrt(sum((t**2).sum().item() for t in tensors))


def mars_rows(trainer):
    """Of each logged loss: the step and the "mars/" values."""
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return {row["step"]: {k: v for k, v in row.items() if k.startswith("mars/")} for row in rows}


@pytest.mark.parametrize("optim", ["mars_adamw", "mars_lion", "mars_shampoo"])
def test_values_equal_an_independent_computation(tmp_path, optim):
    """With gradient accumulation, clipping by the global norm, and a max_norm that some tensors exceed."""
    recorder, gamma, beta1, max_norm = Recorder(), 0.05, 0.95, 0.4
    optim_args = f"gamma={gamma},beta1={beta1},max_norm={max_norm},lr_1d=5e-4"
    trainer = train(tmp_path, callbacks=[recorder], **SETTINGS, optim=optim, optim_args=optim_args)
    kappa = gamma * beta1 / (1 - beta1)
    names = [name for name, p in trainer.model.named_parameters() if p.ndim >= 2]
    rows = mars_rows(trainer)
    assert len(rows) == len(recorder.grads) == 6
    fractions = []
    for step, (grads, rates) in enumerate(zip(recorder.grads, recorder.rates, strict=True), start=1):
        g = [grads[name] for name in names]
        last = [recorder.grads[step - 2][name] for name in names] if step > 1 else g
        corrected = [a + kappa * (a - b) for a, b in zip(g, last, strict=True)]
        fractions.append(sum(total([c]) > max_norm for c in corrected) / len(names))
        expected = {
            "mars/correction_ratio": kappa * total([a - b for a, b in zip(g, last, strict=True)]) / total(g),
            "mars/clipped_fraction": fractions[-1],
            SKIPPED: 0,
            **{f"mars/lr_{kind}": rate for kind, rate in rates.items()},
        }
        if step > 1:
            inner = sum((a * b).sum().item() for a, b in zip(g, last, strict=True))
            expected["mars/gradient_cosine"] = inner / total(g) / total(last)
        assert rows[step] == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert min(fractions) < max(fractions) < 1  # the clip was at work, on some tensors
    assert any(row["mars/lr_matrix"] == 2 * row["mars/lr_1d"] > 0 for row in rows.values())


def test_exact_mode_subtracts_the_gradient_at_the_previous_point(tmp_path):
    """One batch of all data and no dropout: ∇f(x_{t−1}, ξ_t) is the gradient of the step before."""
    recorder = Recorder()
    model = tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    data = {"train_dataset": token_blocks(4), "gradient_accumulation_steps": 1}
    settings = {**SETTINGS, **data, "optim_args": "exact=true,gamma=0.025,beta1=0.95"}
    trainer = train(tmp_path, model=model, callbacks=[recorder], **settings)
    names = [name for name, p in model.named_parameters() if p.ndim >= 2]
    for step, row in mars_rows(trainer).items():
        g, last = ([recorder.grads[max(i, 0)][name] for name in names] for i in (step - 1, step - 2))
        ratio = 0.475 * total([a - b for a, b in zip(g, last, strict=True)]) / total(g)
        assert row["mars/correction_ratio"] == pytest.approx(ratio, rel=1e-3)
        assert ("mars/gradient_cosine" in row) == (step > 1)


def test_only_logged_steps_measure_and_only_losses_carry_it(tmp_path, monkeypatch):
    measured = []

    def counted(optimizer):
        measured.append(len(measured))
        return step_diagnostics(optimizer)

    monkeypatch.setattr(callbacks, "step_diagnostics", counted)
    settings = {"logging_steps": 3, "logging_first_step": True, "eval_strategy": "steps", "eval_steps": 2}
    trainer = train(tmp_path, **settings)
    assert len(measured) == 3
    assert [step for step, row in mars_rows(trainer).items() if row] == [1, 3, 6]
    others = [row for row in trainer.state.log_history if "loss" not in row]
    assert len(others) == 4 and not any(key.startswith("mars/") for row in others for key in row)
    assert not optimizer_of(trainer)._optimizer_step_pre_hooks


@pytest.mark.parametrize("accumulation", [1, 3])
def test_logging_once_an_epoch(tmp_path, accumulation):
    epochs = {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}
    trainer = train(tmp_path, **epochs, optim_args="max_norm=1.0", gradient_accumulation_steps=accumulation)
    rows = mars_rows(trainer)
    assert len(rows) == 2 and all(row.keys() == MEASURED | RATES | {SKIPPED} for row in rows.values())


@pytest.mark.parametrize(
    ("optim", "optim_args", "known"),
    [
        ("mars_adamw", "gamma=0,max_norm=1.0", {"mars/clipped_fraction"}),
        ("mars_adamw", "gamma=0", set()),
        ("mars_adamw", "", {"mars/correction_ratio", "mars/gradient_cosine"}),
        ("mars_adamw", "max_norm=1.0", MEASURED),
        ("mars_lion", "", set()),
        ("mars_lion", "max_norm=1.0", MEASURED),
        # Its embeddings keep g_{t−1}, but a ratio of those alone would pass for that of the model.
        ("mars_shampoo", "", set()),
        ("mars_shampoo", "max_norm=1.0", MEASURED),
        ("mars_m", "", set()),
        ("mars_m", "max_norm=1.0", MEASURED),
    ],
)
def test_what_cannot_be_known_is_left_out(tmp_path, optim, optim_args, known):
    rows = mars_rows(train(tmp_path, optim=optim, optim_args=optim_args, max_steps=2))
    assert rows[2].keys() - RATES - {"mars/lr_embedding"} == known | {SKIPPED}


def test_weights_and_losses_are_the_same_with_and_without(tmp_path):
    on, off = (train(tmp_path, **SETTINGS, mars_diagnostics=choice) for choice in (True, False))
    assert_equal(weights(on), weights(off))
    assert not any(mars_rows(off).values()) and all(mars_rows(on).values())
    assert [row["loss"] for row in on.state.log_history if "loss" in row] == [
        row["loss"] for row in off.state.log_history if "loss" in row
    ]


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_other_optimizers_have_none(tmp_path, optim):
    assert not any(mars_rows(train(tmp_path, optim=optim, max_steps=2)).values())


def test_a_stock_trainer_given_the_callback(tmp_path):
    """As one of callbacks=[…] it comes after the reporters; trainer_state.json has the values all the same."""
    stock = train(tmp_path, Trainer, callbacks=[MarsDiagnosticsCallback()], **SETTINGS)
    mars = train(tmp_path, MarsTrainer, fuse_clip=False, **SETTINGS)
    assert mars_rows(stock) == mars_rows(mars)


def test_attached_once(tmp_path):
    trainer = make_trainer(tmp_path)
    MarsDiagnosticsCallback().attach(trainer)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(MarsDiagnosticsCallback) == 1 and kinds[0] is MarsDiagnosticsCallback


def test_tensorboard_and_trainer_state_have_them(tmp_path, monkeypatch):
    """Reporters come before the user's callbacks in the Trainer's list: attach() must have gone before them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(tmp_path, Trainer, report_to="tensorboard", optim_args="max_norm=1.0")
    MarsDiagnosticsCallback().attach(trainer)
    trainer.train()
    trainer.save_state()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    saved = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    for key in MEASURED | RATES:
        written = {event.step: event.value for event in events.Scalars(f"train/{key}")}
        assert written == pytest.approx({row["step"]: row[key] for row in saved if key in row}, rel=1e-6)
        assert len(written) == (5 if key == "mars/gradient_cosine" else 6)


@pytest.mark.parametrize("reporter", ["wandb", "trackio"])
def test_weights_and_biases_and_trackio_get_them(tmp_path, monkeypatch, reporter):
    """transformers' own callbacks, over a stand-in for the library that they hand the values to."""
    library = MagicMock(__spec__=ModuleSpec(reporter, None), __version__="0.21.0")
    config_util = MagicMock(ConfigError=type("ConfigError", (Exception,), {}))
    monkeypatch.setitem(sys.modules, reporter, library)
    monkeypatch.setitem(sys.modules, "wandb.sdk.lib.config_util", config_util)
    trainer = make_trainer(tmp_path, Trainer, report_to=reporter, optim_args="max_norm=1.0")
    MarsDiagnosticsCallback().attach(trainer)
    trainer.train()
    written = [call.args[0] for call in library.log.call_args_list]
    losses = [row for row in written if "train/loss" in row]
    for logged, (step, row) in zip(losses, mars_rows(trainer).items(), strict=True):
        assert logged["train/global_step"] == step
        assert {key: logged[key] for key in logged if "mars/" in key} == {f"train/{k}": v for k, v in row.items()}
    assert losses[1].keys() >= {f"train/{key}" for key in MEASURED | RATES}


def test_a_run_that_broke_off_in_its_step_leaves_no_hook(tmp_path):
    class Breaks(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, callbacks=[breaks := Breaks()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(breaks)
    optimizer = optimizer_of(trainer)
    trainer.train()
    assert not optimizer._optimizer_step_pre_hooks and all(mars_rows(trainer).values())


# ---- the function itself ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_halves_neither_overflow_nor_vanish(dtype):
    """Products of gradients around 1e-4 and 1e3 leave float16's range."""
    for size in (1e-4, 1e3):
        params = make_params(dtype=dtype)
        optimizer = MarsAdamW(params, optimize_1d=True, **PAPER)
        g, last = make_gradients(params, 2, scales=(size,))
        for step in (last, g):
            for p, grad in zip(params, step, strict=True):
                p.grad = grad
            measured = step_diagnostics(optimizer)
            optimizer.step()
        g, last = ([t.double() for t in ts] for ts in (g, last))
        inner = sum((a * b).sum().item() for a, b in zip(g, last, strict=True))
        assert measured["gradient_cosine"] == pytest.approx(inner / total(g) / total(last), abs=1e-5)
        ratio = 0.475 * total([a - b for a, b in zip(g, last, strict=True)]) / total(g)
        assert measured["correction_ratio"] == pytest.approx(ratio, rel=1e-5)


@EVERY_METHOD
def test_nothing_is_changed(method):
    params = make_params()
    optimizer = make(method, params)
    gradients = make_gradients(params, 2)
    for i, step in enumerate(gradients):
        for p, grad in zip(params, step, strict=True):
            p.grad = grad.clone()
        if i == 0:
            optimizer.step()
    before = [t.clone() for p in params for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
    step_diagnostics(optimizer)
    after = [t for p in params for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
    assert_equal(after, before)
    assert_equal([p.grad for p in params], gradients[1])


def test_no_gradients_or_zero_ones():
    """Nothing is divided by zero."""
    params = make_params()
    optimizer = MarsLion(params, max_norm=1.0)
    assert step_diagnostics(optimizer) == {"lr_matrix": 3e-3, "lr_1d": 1.5e-3}
    for p in params:
        p.grad = torch.zeros_like(p)
    assert step_diagnostics(optimizer) == {"clipped_fraction": 0.0, "lr_matrix": 3e-3, "lr_1d": 1.5e-3}


@pytest.mark.slow
def test_sharded_parameters_give_the_whole_tensors_values():
    """FSDP2 on two processes against one process, float64."""
    alone, sharded = json.loads(launch(2, "engines/diagnostics_worker.py").strip().splitlines()[-1])
    assert alone.keys() == sharded.keys() >= {"correction_ratio", "gradient_cosine", "clipped_fraction"}
    assert 0 < alone["clipped_fraction"] < 1
    assert sharded == pytest.approx(alone, rel=1e-12)
