"""Where a run starts, and what it removes."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from clm_helpers import log_history, parse, run_main

from hf_mars.clm.errors import UsageError
from hf_mars.clm.output_folder import checkpoint_to_resume
from hf_mars.clm.run import main


def make_checkpoint(folder, step, *, complete=True, optimizer=True):
    """One without a manifest, as stock Trainers leave them."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    if complete:
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"):
        if optimizer or name == "pytorch_model.bin":
            torch.save({}, checkpoint / name)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Output folders in the present folder, each as a run may have left it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for step in (5, 10):
        make_checkpoint(tmp_path / "two", step)
    make_checkpoint(tmp_path / "cut", 9)
    make_checkpoint(tmp_path / "cut", 10, complete=False)
    make_checkpoint(tmp_path / "weights", 5, optimizer=False)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "log.txt").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()


BOTH_WAYS_OUT = "--resume_from_checkpoint true.*--overwrite_output_dir"


@pytest.mark.parametrize(
    "output_dir, options, expected",
    [
        ("new", "", None),
        ("empty", "", None),
        ("new", "--resume_from_checkpoint auto", None),
        ("logs", "--resume_from_checkpoint auto", None),
        ("two", "--resume_from_checkpoint true", "two/checkpoint-10"),
        ("two", "--resume_from_checkpoint True", "two/checkpoint-10"),
        ("two", "--resume_from_checkpoint auto", "two/checkpoint-10"),
        ("two", "--resume_from_checkpoint two/checkpoint-5", "two/checkpoint-5"),
        ("new", "--resume_from_checkpoint two/checkpoint-5", "two/checkpoint-5"),
        ("cut", "--resume_from_checkpoint true", "cut/checkpoint-9"),
        ("two", "--overwrite_output_dir", None),
        ("two", "", UsageError(BOTH_WAYS_OUT)),
        ("logs", "", UsageError(BOTH_WAYS_OUT)),
        ("model", "--resume_from_checkpoint false", UsageError(BOTH_WAYS_OUT)),
        ("model", "--resume_from_checkpoint auto", UsageError("finished model.*--overwrite_output_dir")),
        ("logs", "--resume_from_checkpoint two/checkpoint-5", UsageError("outside of --output_dir logs")),
        (
            "cut",
            "--resume_from_checkpoint cut/checkpoint-10",
            UsageError("trainer_state.json is missing; the newest whole checkpoint there is cut/checkpoint-9"),
        ),
        ("cut", "--resume_from_checkpoint cut/checkpoint-8", UsageError("is no folder")),
        ("new", "--resume_from_checkpoint true", UsageError("no whole checkpoint")),
        ("weights", "--resume_from_checkpoint true", UsageError("no optimizer state.*--model_name_or_path")),
    ],
)
def test_where_a_run_starts(folders, output_dir, options, expected):
    _, _, run_args, training_args = parse("--output_dir", output_dir, *options.split())
    if isinstance(expected, UsageError):
        with pytest.raises(UsageError, match=str(expected)):
            checkpoint_to_resume(training_args, run_args)
    else:
        assert checkpoint_to_resume(training_args, run_args) == expected


def test_auto_starts_anew_where_no_checkpoint_is_whole_and_says_so(tmp_path, caplog):
    make_checkpoint(tmp_path, 10, complete=False)
    _, _, run_args, training_args = parse("--output_dir", tmp_path, "--resume_from_checkpoint", "auto")
    with caplog.at_level(logging.WARNING, "run_clm"):
        assert checkpoint_to_resume(training_args, run_args) is None
    assert (
        "not whole: checkpoint-10 (trainer_state.json is missing); the run starts anew, and these folders stay"
        in caplog.text
    )


@pytest.mark.parametrize(
    "name, why",
    [
        ("a_file", "is no folder"),
        ("a_file/out", "a_file is no folder"),
        ("n" * 300, r"cannot be written to \(File name too long\)"),
        ("/proc/x", r"/proc cannot be written to \(.*\)"),
    ],
)
def test_a_folder_that_cannot_be_written(tmp_path, name, why):
    (tmp_path / "a_file").touch()
    with pytest.raises(UsageError, match=f"--output_dir .*{why}; choose another folder"):
        run_main("--output_dir", tmp_path / name)


def test_no_space_for_a_checkpoint(tmp_path, monkeypatch):
    """At least the weights and one tensor of state, where n = 512: n (300 + 32) + 12 n² + 15 n parameters."""
    model = ("--config_overrides", "n_layer=1,n_head=2,n_embd=512,n_positions=32", "--vocab_size", 300)
    least = 2 * 4 * 3_323_392 / 2**20
    run = ["--output_dir", tmp_path, *model, "--do_train", "--max_steps", 1, "--use_cpu", "--report_to", "none"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**20, total=2**30))
    with pytest.raises(UsageError, match=f"a checkpoint takes at least {least:.1f} MiB, and 1.0 MiB are free there"):
        main([*map(str, run)])
    run_main("--output_dir", tmp_path / "no", "--do_train", "--max_steps", 1, "--save_strategy", "no")


def test_overwriting_removes_what_training_wrote_and_nothing_else(tmp_path, caplog):
    output_dir = tmp_path / "out"
    make_checkpoint(output_dir, 7)
    for name in ("notes.txt", "checkpoint-notes.txt", "all_results.json"):
        (output_dir / name).write_text("{}")
    with caplog.at_level(logging.WARNING, "run_clm"):
        run_main("--output_dir", output_dir, "--do_train", "--max_steps", 1, "--overwrite_output_dir")
    names = {path.name for path in output_dir.iterdir()}
    assert {"notes.txt", "checkpoint-notes.txt", "checkpoint-1", "model.safetensors"} <= names
    assert "checkpoint-7" not in names
    for name in ("checkpoint-7", "all_results.json"):
        assert f"removing {output_dir / name}" in caplog.text
    assert log_history(output_dir)[-1]["step"] == 1


def test_overwriting_spares_what_the_run_reads(trained):
    output_dir, _ = trained
    checkpoint = output_dir / "checkpoint-20"
    with pytest.raises(UsageError, match=f"would remove {checkpoint}, which this run reads"):
        run_main("--output_dir", output_dir, "--overwrite_output_dir", "--model_name_or_path", checkpoint)
    assert checkpoint.is_dir()
