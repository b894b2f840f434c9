"""The command line: its defaults, its mistakes, and the two ways to start it."""

import dataclasses
import runpy

import pytest
from clm_helpers import TINY_MODEL, log_history, parse, run_script
from launch_helpers import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_mars import MarsTrainingArguments
from hf_mars.clm import early


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], (True, True)),
        (["--eval_strategy", "steps"], (True, True)),
        (["--do_train"], (True, False)),
        (["--do_train", "--eval_strategy", "epoch"], (True, True)),
        (["--do_eval"], (False, True)),
        (["--do_eval", "--do_train"], (True, True)),
    ],
    ids=lambda value: " ".join(value) or "none" if isinstance(value, list) else "",
)
def test_training_and_evaluation_are_on_unless_one_is_chosen(arguments, expected):
    training_args = parse("--output_dir", "x", *arguments)[-1]
    assert (training_args.do_train, training_args.do_eval) == expected


LEARNING_RATES = {"mars_adamw": 1e-2, "mars_lion": 2e-3, "mars_shampoo": 3e-2, "mars_m": 1e-2}
RARER = [pytest.param(optim, marks=pytest.mark.exhaustive) for optim in ("mars_adamw", "mars_shampoo")]


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["mars_m", "mars_lion", *RARER])
def test_the_command_trains_and_saves(optim, tmp_path):
    run = run_script(
        *("--optim", optim, "--learning_rate", LEARNING_RATES[optim], "--output_dir", "out", "--max_steps", 40),
        *("--logging_steps", 10, "--eval_on_start", "--max_eval_samples", 20, "--use_cpu", *TINY_MODEL),
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert "40/40" in run.stderr  # the progress bar
    history = log_history(tmp_path / "out")
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    assert evaluations[-1] < evaluations[0] - 0.3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("It is a truth", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, pad_token_id=0).shape[1] > 5


FACES = {"run_clm.py": [str(ROOT / "run_clm.py")], "python -m hf_mars.clm": ["-m", "hf_mars.clm"]}


def start(monkeypatch, program, arguments):
    """A face of the command, started in this process."""
    monkeypatch.setattr("sys.argv", [FACES[program][-1], *arguments])
    if program == "run_clm.py":
        runpy.run_path(*FACES[program], run_name="__main__")
    else:
        runpy.run_module("hf_mars.clm", run_name="__main__")


@pytest.mark.parametrize("program", FACES)
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--save_strategy", "foo"], "invalid choice: 'foo'"),
        (["unclosed.yaml"], "unclosed.yaml: cannot be read as a file of arguments: while parsing"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, program, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unclosed.yaml").write_text("{unclosed")
    with pytest.raises(SystemExit, match="2"):
        start(monkeypatch, program, arguments)
    error = capsys.readouterr().err
    assert error.startswith(f"{program}: error: ") and words in error
    assert error.count("\n") == 1 and error.endswith("\n")


@pytest.mark.slow
def test_the_command_fails_in_one_line_before_anything_is_made(tmp_path):
    run = run_script("--optim", "mars_adamw", "--optim_args", "gamm=0.1", "--output_dir", "x", cwd=tmp_path)
    assert run.returncode == 2
    error = run.stderr.strip().splitlines()[-1]
    assert error.startswith("run_clm.py: error: ") and "'gamm'" in error and "'gamma'" in error
    assert "Traceback" not in run.stderr and "usage:" not in run.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("program", FACES)
def test_help_names_the_program_and_every_argument(monkeypatch, capsys, program):
    with pytest.raises(SystemExit, match="0"):
        start(monkeypatch, program, ["--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: {program} [-h]") or printed.startswith(f"usage: {program}\n")
    assert "--lora_r" in printed and "--global_batch_size" in printed and "--optim_args" in printed


@pytest.mark.slow
def test_the_package_trains_without_a_checkout(tmp_path):
    """As after `pip install`: from another folder, on the novel in the package."""
    run = run_script(
        *("--output_dir", "out", "--max_steps", 3, "--max_eval_samples", 2, "--use_cpu", *TINY_MODEL),
        cwd=tmp_path,
        command=FACES["python -m hf_mars.clm"],
    )
    assert run.returncode == 0, run.stderr
    assert log_history(tmp_path / "out")[-1]["step"] == 3
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_every_argument_of_a_trainer_of_ours_is_one():
    """Also for the check that knows transformers' arguments from their source, and ours by name."""
    ours = {field.name for field in dataclasses.fields(MarsTrainingArguments) if field.init}
    ours -= {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {"max_skipped_steps", "checkpoint_checksums"} <= ours <= early._OURS
    *_, args = parse("--output_dir", "out", "--max_skipped_steps", 3, "--checkpoint_checksums", "full")
    assert (args.max_skipped_steps, args.checkpoint_checksums) == (3, "full")
