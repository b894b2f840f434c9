"""A resumed run does what its arguments say, or says that it does not."""

import json
import logging
import shutil

import pytest
import torch
from trainer_helpers import MarsTrainer, Trainer, make_trainer, optimizer_of, train

from hf_mars.trainer.checkpoints import MANIFEST, CheckpointError, ResumeError

SAVED = "gamma=0.3,max_norm=2.0,beta1=0.8,lr_1d=4e-3"


def run(folder, optim="mars_adamw", **settings):
    options = {"optim": optim, "optim_args": SAVED, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    return train(folder, **{**options, **settings})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoint-2 of a run per optimizer, made when it is asked for."""
    made = {}

    def get(optim="mars_adamw", **settings):
        key = (optim, *sorted(settings.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("run")
            run(folder, optim, **settings)
            made[key] = folder / "checkpoint-2"
        return made[key]

    return get


def resume(checkpoint, tmp_path, cls=MarsTrainer, *, steps=0, **settings):
    """The trainer that went on from a checkpoint for a number of steps, none by default."""
    options = {"save_strategy": "no", "lr_scheduler_type": "constant", "max_steps": 2 + max(steps, 1)}
    trainer = make_trainer(tmp_path / "resumed", cls, **{**options, **settings})
    if steps:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    else:
        trainer.create_optimizer()
        trainer.create_scheduler(3)
        trainer._load_optimizer_and_scheduler(str(checkpoint))
    return trainer


def setting(trainer, key, kind="matrix"):
    """The values of a setting, as text, in the groups of a kind."""
    groups = [group for group in optimizer_of(trainer).param_groups if group["kind"] == kind]
    if key.startswith("beta"):
        return {repr(group["betas"][int(key[-1]) - 1]) for group in groups}
    return {repr(group[key]) for group in groups}


@pytest.fixture
def warned(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_mars"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.mark.parametrize("cls", [MarsTrainer, Trainer])
@pytest.mark.parametrize(
    "key, given, new, kind, logged",
    [
        ("gamma", "gamma=0.2", 0.2, "matrix", "gamma: 0.3 → 0.2"),
        ("max_norm", "max_norm=3", 3.0, "matrix", "max_norm: 2.0 → 3.0"),
        ("eps", "eps=1e-6", 1e-6, "matrix", "eps: 1e-08 → 1e-06"),
        ("beta1", "beta1=0.7", 0.7, "matrix", "beta1: 0.8 → 0.7"),
        ("beta2", "beta2_1d=0.8", 0.8, "1d", "beta2_1d: "),
        ("state_dtype", "state_dtype=bfloat16", "bfloat16", "matrix", "state_dtype: None → bfloat16"),
        ("foreach", "foreach=true", True, "matrix", "foreach: None → True"),
    ],
)
def test_what_is_given_takes_effect_and_is_logged(saved, tmp_path, warned, cls, key, given, new, kind, logged):
    trainer = resume(saved(), tmp_path, cls, optim_args=given)
    assert setting(trainer, key, kind) == {repr(new)}
    assert logged in warned.text


def test_what_is_not_given_stays_as_it_was_saved(saved, tmp_path, warned):
    """Whatever the defaults are by then."""
    trainer = resume(saved(), tmp_path, optim_args=None, adam_beta1=None)
    assert setting(trainer, "gamma") == {"0.3"} and setting(trainer, "max_norm") == {"2.0"}
    assert setting(trainer, "beta1") == {"0.8"}
    assert setting(trainer, "initial_lr", "1d") == {"0.004"}
    assert "kept from the checkpoint" in warned.text and "gamma=0.3 (otherwise" in warned.text


def test_the_same_arguments_change_and_say_nothing(saved, tmp_path, warned):
    before = torch.load(saved() / "optimizer.pt", weights_only=True)["param_groups"]
    trainer = resume(saved(), tmp_path, optim_args=SAVED)
    assert optimizer_of(trainer).state_dict()["param_groups"] == before
    assert "resumed with" not in warned.text and "kept from" not in warned.text


@pytest.mark.parametrize("optim", ["mars_adamw", "mars_shampoo"])
def test_a_learning_rate_that_is_given_goes_through_the_scheduler(saved, tmp_path, warned, optim):
    """The other rate keeps its ratio to it; the schedule goes on where it was."""
    checkpoint = saved(optim, lr_scheduler_type="linear", max_steps=8, save_steps=2)
    settings = {"optim": optim, "lr_scheduler_type": "linear", "max_steps": 8, "optim_args": "gamma=0.3"}
    rates = {}
    for rate in (1e-2, 2e-2):
        trainer = make_trainer(tmp_path / str(rate), learning_rate=rate, **settings)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        rows = [row for row in trainer.state.log_history if row["step"] > 2 and "loss" in row]
        rates[rate] = [row["learning_rate"] for row in rows]
        kinds = {group["kind"]: group["initial_lr"] for group in optimizer_of(trainer).param_groups}
        assert (kinds["matrix"], kinds["1d"]) == (rate, pytest.approx(4e-3 * rate / 1e-2))
    assert len(rates[1e-2]) == 6
    assert rates[2e-2] == pytest.approx([2 * rate for rate in rates[1e-2]])
    assert "learning_rate: 0.01 → 0.02" in warned.text


def test_weight_decay_that_is_given(saved, tmp_path, warned):
    trainer = resume(saved(), tmp_path, optim_args=SAVED, weight_decay=0.3)
    decays = {group["weight_decay"] for group in optimizer_of(trainer).param_groups}
    assert decays == {0.3, 0.0} and "weight_decay: 0.1 → 0.3" in warned.text


def test_betas_of_training_arguments(saved, tmp_path, warned):
    trainer = resume(saved(), tmp_path, optim_args=None, adam_beta1=0.6)
    assert setting(trainer, "beta1") == {"0.6"}


@pytest.mark.parametrize(
    "optim, saved_with, other, given, message",
    [
        ("mars_shampoo", SAVED, "mars_m", None, "optim='mars_shampoo', but this run has optim='mars_m'"),
        ("mars_m", SAVED, "mars_shampoo", None, "optim='mars_m', but this run has optim="),
        ("mars_adamw", SAVED, "mars_lion", None, "optim='mars_adamw', but this run has optim='mars_lion'"),
        ("mars_adamw", SAVED, "adamw_torch", None, "optim='mars_adamw', but this run has optim="),
        ("mars_adamw", SAVED, "sgd", None, "optim='mars_adamw', but this run has optim='sgd'"),
        ("mars_adamw", SAVED, "mars_adamw", "exact=true", "exact=False, but this run .mars_adamw. has exact=True"),
        ("mars_adamw", SAVED, "mars_adamw", "optimize_1d=true", "optimize_1d=False, but this run"),
        ("mars_adamw", SAVED, "mars_adamw", "adjust_lr_fn=original", "adjust_lr_fn='match_rms_adamw', but"),
        ("mars_lion", "gamma=0.3,max_norm=none", "mars_lion", "max_norm=1", "hold no previous gradients"),
    ],
)
def test_what_changes_the_meaning_of_the_state_is_refused(saved, tmp_path, optim, saved_with, other, given, message):
    checkpoint = saved(optim, optim_args=saved_with)
    with pytest.raises(ValueError, match=message):
        resume(checkpoint, tmp_path, optim=other, optim_args=given)


@pytest.mark.parametrize(
    "optim, other",
    [
        ("mars_adamw", "mars_lion"),
        ("mars_m", "mars_adamw"),
        ("mars_shampoo", "mars_lion"),
        ("mars_lion", "adamw_torch"),
        ("mars_m", "adamw_torch"),
    ],
)
def test_a_checkpoint_without_a_manifest_tells_its_optimizer_too(saved, tmp_path, optim, other):
    """Stock Trainers write none."""
    checkpoint = shutil.copytree(saved(optim), tmp_path / "checkpoint-2")
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(
        ResumeError, match=f"optim='{optim}', but this run has optim='{other}'.*go on with {optim}, or"
    ):
        resume(checkpoint, tmp_path, Trainer, optim=other, optim_args=None)


@pytest.mark.parametrize("content", [b"torn", b""])
def test_an_optimizer_s_file_that_cannot_be_read_is_left_to_the_trainer(saved, tmp_path, content):
    checkpoint = shutil.copytree(saved(), tmp_path / "checkpoint-2")
    (checkpoint / MANIFEST).unlink()
    (checkpoint / "optimizer.pt").write_bytes(content)
    with pytest.raises(Exception) as error:
        resume(checkpoint, tmp_path, Trainer, optim="mars_lion", optim_args=None)
    assert not isinstance(error.value, ResumeError)


@pytest.mark.parametrize("engine, words", [("DEEPSPEED", "saved with DeepSpeed"), ("NO", None)])
def test_a_checkpoint_of_deepspeed_is_refused_without_it(saved, tmp_path, engine, words):
    """Its optimizer's state lies in files that no other engine reads; what a manifest says is enough to know."""
    checkpoint = shutil.copytree(saved(), tmp_path / "checkpoint-2")
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps({**manifest, "engine": engine}))
    if words is None:
        resume(checkpoint, tmp_path, optim_args=SAVED)
        return
    with pytest.raises(CheckpointError, match=words):
        resume(checkpoint, tmp_path, optim_args=SAVED)


@pytest.mark.parametrize("optim", ["mars_adamw", "adamw_torch"])
def test_a_manifest_that_cannot_be_read_is_named(saved, tmp_path, optim):
    """Also to a stock Trainer, which does not look whether checkpoints are whole."""
    checkpoint = shutil.copytree(saved(), tmp_path / "checkpoint-2")
    (checkpoint / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{MANIFEST}: it lists no files"):
        resume(checkpoint, tmp_path, optim=optim, optim_args=None, cls=Trainer)


def test_a_clip_that_is_turned_off_is_no_such_change(saved, tmp_path):
    trainer = resume(saved("mars_lion"), tmp_path, optim="mars_lion", optim_args="max_norm=none", steps=1)
    assert setting(trainer, "max_norm") == {"None"}


def test_states_are_converted_and_the_run_goes_on(saved, tmp_path):
    trainer = resume(saved(), tmp_path, optim_args="state_dtype=bfloat16,last_grad_dtype=bfloat16", steps=2)
    state = next(iter(optimizer_of(trainer).state.values()))
    assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq", "last_grad")} == {torch.bfloat16}


def test_a_checkpoint_of_adamw_is_refused_with_the_way_out(tmp_path):
    run(tmp_path, "adamw_torch", optim_args=None)
    with pytest.raises(ValueError, match=r"not one of MARS's.*in a loop of your own.*hf_mars.optim.from_adamw"):
        resume(tmp_path / "checkpoint-2", tmp_path)


def test_a_stock_trainer_says_that_the_optimizer_starts_anew(saved, tmp_path, warned):
    checkpoint = shutil.copytree(saved(), tmp_path / "checkpoint-2")
    (checkpoint / "scheduler.pt").unlink()
    (checkpoint / MANIFEST).unlink()
    resume(checkpoint, tmp_path, Trainer)
    assert "it starts anew" in warned.text


def test_an_optimizer_of_the_user_s_own_is_left_alone(saved, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3, optim_args="gamma=0.2")
    own = type(optimizer_of(resume(saved(), tmp_path, optim_args=SAVED)))
    trainer.optimizer = own([p for p in trainer.model.parameters() if p.ndim > 1], gamma=0.2)
    before = trainer.optimizer.state_dict()
    trainer.create_optimizer()
    trainer.create_scheduler(3)
    assert trainer.optimizer.state_dict()["param_groups"][0]["gamma"] == before["param_groups"][0]["gamma"] == 0.2
