"""Every benchmark runs to its end, at the smallest size, and prints its table. What it measures then means nothing."""

import importlib
import re
import sys

import pytest
import torch
from launch_helpers import NEEDS_DEEPSPEED, ROOT, launch
from transformers import GPT2Config

pytestmark = pytest.mark.slow

BENCHMARKS = ROOT / "benchmarks"
TINY_RUN = "--max_steps 1 --max_eval_samples 1 --block_size 16 --per_device_train_batch_size 2 --use_cpu".split()
TINY_MODEL = ["--config_overrides", "n_layer=1,n_head=2,n_embd=32,n_positions=64"]
SHAPES = {"GPT-2 small": [(4, 4), (4,)], "LoRA": [(2, 4)], "hidden matrices of GPT-2 small": [(4, 4)]}


def tiny_step_time(module, patch):
    patch.setattr(module, "parameter_sets", lambda: SHAPES)


def tiny_diagnostics_cost(module, patch):
    tiny_step_time(module, patch)
    patch.setattr(module, "CALLS", 2)
    patch.setattr(module, "REPEATS", 1)


def tiny_low_precision(module, patch):
    train = module.train

    def tiny_train(folder, *options):
        return train(folder, *options, *TINY_RUN, *([] if "--model_name_or_path" in " ".join(options) else TINY_MODEL))

    patch.setattr(module, "train", tiny_train)


def tiny_trainer_throughput(module, patch):
    config = GPT2Config(vocab_size=32, n_layer=1, n_head=1, n_embd=8, n_positions=16)
    patch.setitem(module.MODELS, "demo", (config, 2, {}))


# name -> its arguments; the rows of its tables, to which the `bench` extra adds; what shrinks the rest
RUNS = {
    "data_preparation": ("--repeat 1 --rounds 1 --block_size 64", 2, None),
    "diagnostics_cost": ("", 0, tiny_diagnostics_cost),
    "exact_cost": ("--n_layer 1 --n_embd 8 --vocab 32 --block 8 --batch 1 --accumulate 1 --turn 1 --turns 2", 2, None),
    "exact_variance": ("--seeds 1 --lrs 0.1", 9, None),
    "host_time": ("--turns 3", 24, None),
    "low_precision": ("", 6, tiny_low_precision),
    "state_bytes": ("", 26, None),
    "step_time": ("--steps 1 --device cpu", 18, tiny_step_time),
    "trainer_throughput": ("--turns 1 --steps 3", 5, tiny_trainer_throughput),
    "update_time": ("--updates 1 --threads 1", 2 * 3 * 7 + 3 * 2, tiny_step_time),
}


def rows_of(output):
    """The rows of the tables without their heads."""
    return len(re.findall(r"^\|.*\|$", output, re.M)) - 2 * len(re.findall(r"^\|[ |-]+\|$", output, re.M))


@pytest.mark.parametrize("name", RUNS)
def test_runs(name, monkeypatch, tmp_path, capsys):
    arguments, rows, make_tiny = RUNS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [name, *arguments.split()])
    module = importlib.import_module(name)
    if make_tiny is not None:
        make_tiny(module, monkeypatch)
    module.main()
    output = capsys.readouterr().out
    assert re.search(r"\d", output) and not re.search(r"\b(nan|inf)\b", output), output
    assert rows_of(output) >= rows, output


def test_step_time_without_muon(monkeypatch):
    """torch has it from 2.9 on, and 2.8 is enough for us."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("step_time")
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    assert "torch.optim.Muon" not in str(module.contestants())


def test_sharded_step_runs():
    output = launch(2, BENCHMARKS / "sharded_step.py", "--layers", 1, "--width", 8, "--steps", 1)
    assert rows_of(output) == 10, output


@NEEDS_DEEPSPEED
@pytest.mark.exhaustive  # it compiles DeepSpeedCPUAdam
def test_offload_step_runs(tmp_path):
    # In a folder of its own: DeepSpeed waits for ever for the lock that a killed process left in the user's.
    arguments = ["--layers", 1, "--width", 12, "--turns", 1]
    output = launch(1, BENCHMARKS / "offload_step.py", *arguments, TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert rows_of(output) == 5, output


def test_every_benchmark_is_run():
    elsewhere = {
        "sharded_step",
        "offload_step",
        "communication",
        "communication_formulas",
    }  # here, and in test_scaling.py
    elsewhere |= {"pretrain_gpu", "pretrain_gpu_runs", "evidence"}  # in files of their own
    elsewhere |= {path.stem for path in BENCHMARKS.glob("gpu_check*.py")}  # in test_gpu_check.py
    assert {path.stem for path in BENCHMARKS.glob("*.py")} == RUNS.keys() | elsewhere
