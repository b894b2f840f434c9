"""The one line that says what is in effect."""

import json
import logging

import forks
import pytest
import torch
from helpers import make_gradients, make_params, run_steps, tiny_gpt2
from kernel_helpers import cpu
from launch_helpers import NEEDS_DEEPSPEED
from trainer_helpers import make_trainer, optimizer_of, token_blocks, train
from transformers import Trainer, TrainingArguments

from hf_mars import MarsAdamW, MarsLion
from hf_mars.trainer.summary import summary


@pytest.fixture(autouse=True)
def transformers_default_verbosity(caplog):
    caplog.set_level("WARNING", "hf_mars")  # run_clm, in this process, sets INFO


def stock_trainer(folder, **settings):
    defaults = {"optim": "mars_adamw", "max_steps": 2, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    args = TrainingArguments(str(folder), **{**defaults, **settings}, disable_tqdm=True)
    return Trainer(tiny_gpt2(), args, train_dataset=token_blocks())


def lines(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("Mars")]


def test_the_stock_trainer_shows_it_once(tmp_path, capsys):
    """At transformers' default verbosity, WARNING; with what differs from an AdamW user's arguments."""
    trainer = stock_trainer(tmp_path, optim="mars_lion")
    trainer.train()
    (line,) = lines(capsys)
    assert line.startswith("MarsLion (optim=mars_lion): ")
    matrices = [p for p in trainer.model.parameters() if p.dim() > 1]
    size = f"{len(matrices)} matrix tensors ({sum(p.numel() for p in matrices):,} parameters)"
    assert f"{size}: lion with lr=5e-05, betas=(0.9, 0.99)" in line and "gamma=0.05" in line
    assert "1d tensors" in line and "adamw with lr=2.5e-05, betas=(0.9, 0.95)" in line
    assert "by the compiled step; " in line and "by torch's kernels" in line
    assert "adam_beta2=0.999 (transformers' default counts as not given)" in line
    assert "learning_rate=5e-05 for 1d tensors" in line and "adam_beta1" not in line
    trainer.train()  # the same optimizer
    assert not lines(capsys)


def test_nothing_is_said_to_differ_where_nothing_does(tmp_path, capsys):
    train(tmp_path, max_steps=1)
    (line,) = lines(capsys)
    assert "Not in effect" not in line


def test_it_states_what_a_checkpoint_has_brought(tmp_path, capsys):
    train(tmp_path, max_steps=2, optim_args="gamma=0.125", save_strategy="steps", save_steps=2)
    capsys.readouterr()
    trainer = train(tmp_path, max_steps=4, resume=str(tmp_path / "checkpoint-2"))
    (line,) = lines(capsys)
    assert optimizer_of(trainer).param_groups[0]["gamma"] == 0.125
    assert "gamma=0.125" in line and "gamma=0.05" not in line


def test_other_processes_and_other_optimizers_show_nothing(tmp_path, capsys, monkeypatch):
    stock_trainer(tmp_path, optim="adamw_torch").train()
    monkeypatch.setattr(TrainingArguments, "should_log", False)
    stock_trainer(tmp_path).train()
    assert not lines(capsys)


def test_where_the_log_shows_it_it_goes_there(tmp_path, capsys, caplog):
    with caplog.at_level(logging.INFO, logger="hf_mars"):
        make_trainer(tmp_path, max_steps=1).train()
    assert [r.levelname for r in caplog.records if r.getMessage().startswith("MarsAdamW (optim")] == ["INFO"]
    assert not lines(capsys)


def test_the_reason_for_the_slower_step_is_in_it(monkeypatch):
    monkeypatch.setattr(cpu, "_cpu", None)
    params = make_params(dtype=torch.float32)
    optimizer = MarsLion(params, lr=0.1)
    assert optimizer.executions == {} and "torch's kernels" not in summary(optimizer)
    run_steps(optimizer, params, make_gradients(params, 1))
    assert "by torch's kernels (the compiled step is missing" in summary(optimizer)


@pytest.mark.parametrize("cls", [MarsAdamW, MarsLion])
def test_the_repr_does_not_claim_a_step_that_is_missing(cls, monkeypatch):
    optimizer = cls([torch.ones(2, 2), torch.ones(2)])
    assert repr(optimizer).count("fused: True") == 2
    monkeypatch.setattr(cpu, "_cpu", None)
    shown = repr(optimizer)
    assert shown.count("fused: torch's kernels alone (the compiled step of hf_mars is missing)") == 1
    assert shown.count("fused: True") == 1  # plain AdamW's is torch's
    assert all(group["fused"] is True for group in optimizer.param_groups)  # what a checkpoint holds


def test_the_repr_is_otherwise_torchs():
    optimizer = MarsAdamW([torch.ones(2, 2)])
    assert repr(optimizer) == torch.optim.Optimizer.__repr__(optimizer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage",
    [None, pytest.param(2, marks=[pytest.mark.exhaustive, NEEDS_DEEPSPEED]), pytest.param(3, marks=NEEDS_DEEPSPEED)],
)
def test_two_processes_show_it_once(stage, tmp_path):
    """Whole tensors are counted, whatever an engine has put in their place: with DDP and ZeRO."""
    (tmp_path / "script.py").write_text(
        "import time\nimport hf_mars, torch\nfrom trainer_helpers import token_blocks\nfrom helpers import tiny_gpt2\n"
        "from transformers import HfArgumentParser, Trainer, TrainingArguments\n"
        "(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()\n"
        "Trainer(tiny_gpt2(), args, train_dataset=token_blocks()).train()\n"
        "torch.distributed.barrier()\ntime.sleep(0.5)\n"  # docs/multi_node.md, "Exit codes"
    )
    zero = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": "auto"}
    (tmp_path / "zero.json").write_text(json.dumps(zero))
    options = ["--output_dir", str(tmp_path / "out"), "--optim", "mars_adamw", "--max_steps", "1", "--use_cpu"]
    options += ["--report_to", "none", "--save_strategy", "no"]
    options += [] if stage is None else ["--deepspeed", str(tmp_path / "zero.json")]
    done = forks.start(2, tmp_path / "script.py", options, {"DS_ACCELERATOR": "cpu"}, timeout=240)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("MarsAdamW (optim")]
    sizes = [p.numel() for p in tiny_gpt2().parameters() if p.dim() > 1]
    assert f"{len(sizes)} matrix tensors ({sum(sizes):,} parameters)" in line
