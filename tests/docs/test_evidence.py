"""benchmarks/evidence.py: a task from its text to the file of results and its tables, at the smallest size."""

import argparse
import importlib.util
import json
import shlex
import sys
from pathlib import Path

import pytest

from hf_mars.clm.command_line import parse_arguments
from hf_mars.sweep.__main__ import parser, plan_of

ROOT = Path(__file__).resolve().parents[2]
PLAN = """
learning_rate: [1.0e-3]
seeds: 1
optimizers:
  - {optim: adamw_torch}
  - {optim: mars_adamw, label: "mars_adamw, rate matched"}
"""
TINY = "--use_cpu --max_steps 4 --eval_strategy steps --eval_steps 1 --max_eval_samples 1 --save_strategy no"
TINY_MODEL = ["--config_overrides", "n_layer=1,n_head=2,n_embd=32,n_positions=16"]


def load():
    specification = importlib.util.spec_from_file_location("evidence", ROOT / "benchmarks" / "evidence.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def evidence(monkeypatch, tmp_path):
    module = load()
    (tmp_path / "pretrain.yaml").write_text(PLAN)
    monkeypatch.setattr(module, "PLANS", tmp_path)
    monkeypatch.setattr(module, "COMMON", shlex.split(TINY))
    monkeypatch.setitem(module.TASKS, "pretrain", module.Task("pretrain", TINY_MODEL))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return module


def call(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evidence.py", *map(str, arguments)])
    module.main()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_from_a_text_to_results(evidence, monkeypatch, tmp_path):
    text, out, kept = tmp_path / "text.txt", tmp_path / "out", tmp_path / "kept.json"
    text.write_text("The same few words, over and over again, until there is enough of them.\n" * 400)
    with pytest.raises(SystemExit) as ended:
        call(evidence, monkeypatch, "pretrain", "--text", text, "--output_dir", out, "--timing_steps", "0")
    assert ended.value.code == 0
    call(evidence, monkeypatch, "pretrain", "--output_dir", out, "--keep", kept)
    rows = json.loads(kept.read_text(encoding="utf-8"))
    assert {row["optimizer"] for row in rows} == {"adamw_torch", "mars_adamw, rate matched"}
    assert all(row["status"] == "complete" and len(row["evaluation"]) == 4 for row in rows)
    assert str(tmp_path) not in kept.read_text(encoding="utf-8")  # nobody else has these folders


@pytest.mark.parametrize("arguments", [["finetune"], ["pretrain", "--model", "somewhere"]])
def test_a_model_where_it_belongs(evidence, monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        call(evidence, monkeypatch, *arguments, "--output_dir", "out")
    assert ended.value.code == 2 and "--model" in capsys.readouterr().err


def test_every_task_is_a_plan_and_a_command_that_run_clm_takes(tmp_path):
    module = load()
    for name, task in module.TASKS.items():
        folder = tmp_path / name
        folder.with_name(f"{name}_tokenizer").mkdir()
        (tmp_path / f"{name}_tokenizer" / "tokenizer_config.json").touch()  # or one would be trained
        arguments = argparse.Namespace(
            **{"task": name, "text": None, "model": "model" if task.takes_a_model else None, "plan": None},
            **{"output_dir": str(folder), "jobs": 1, "max_extensions": 0, "timing_steps": 0, "bf16": name != "size"},
        )
        words = module.sweep(arguments)
        assert ("--bf16" in words) is arguments.bf16
        own, command = words[3 : words.index("--")], words[words.index("--") + 1 :]
        plan = plan_of(parser().parse_args(own), command)
        assert len({len(settings) for settings in plan.optimizers.values()}) == 1
        for run in plan.runs():
            parse_arguments([*command[2:], *run.arguments(), "--output_dir", str(folder)])
