"""Whole sweeps of a script that pretends to train: what is run, and what survives being killed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from sweep_helpers import ENVIRONMENT, GRID, QUICK, command, rows_of, sweep

pytestmark = pytest.mark.slow


def ran(folder):
    """(optimizer, learning rate, seed) of the runs that ended, in order, without timing runs."""
    rows = [row for row in rows_of(folder) if row["kind"] == "run"]
    return [(row["optimizer"], float(row["arguments"]["learning_rate"]), row["seed"]) for row in rows]


def begun(file):
    return [tuple(line.split()[:3]) for line in file.read_text().splitlines()]


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def start(folder, *arguments):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(folder, *arguments), env=ENVIRONMENT, cwd=folder.parent, **pipes)


def test_equal_runs_for_all_and_timing_of_the_best(tmp_path):
    done = sweep(tmp_path / "out", *GRID, "--seeds", "2", "--timing_steps", "3", "--time_budget", "5m")
    assert ran(tmp_path / "out") == [(label, rate, s) for s in (1, 2) for rate in (1e-4, 1e-3, 1e-2) for label in "ab"]
    timing = [row for row in rows_of(tmp_path / "out") if row["kind"] == "timing"]
    assert [(row["optimizer"], row["arguments"]["learning_rate"], row["steps"]) for row in timing] == [
        ("a", "0.001", 3),
        ("b", "0.001", 3),
    ] * 2
    row = rows_of(tmp_path / "out")[0]
    assert row["final_loss"] == pytest.approx(2.01) and row["loss_of"] == "training" and row["seconds"] == 0.1
    assert row["command"][:3] == [sys.executable, "-m", "hf_mars"] and row["command"][4:8] == [
        "--optim",
        "a",
        "--learning_rate",
        "0.0001",
    ]
    assert "a is the baseline: 1.0150 at learning rate 0.001." in done.stdout
    assert "b ends level" not in done.stdout and "b reaches a's best loss after 100 % of the steps" in done.stdout
    assert "[12 of 16 runs ended" in done.stderr and "[16 of 16 runs ended, about 0 s left] timing of b" in done.stderr
    for name in ("report.md", "report.json", "loss.png", "seconds.png", "learning_rate.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert not list((tmp_path / "out" / "runs").glob("*/output"))
    again = sweep(tmp_path / "out", *GRID, "--seeds", "2", "--timing_steps", "3")
    assert again.stdout == done.stdout and "0 of 12 runs of the grids are to be made" in again.stderr
    assert "ended" not in again.stderr


def test_where_an_optimum_is_at_an_edge_every_grid_grows(tmp_path):
    """Both have their best at 1e-3; b's grid begins there, a's does not."""
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "seeds: 1\nfinal_seeds: 2\noptimizers:\n"
        "- {optim: a, learning_rate: [1e-4, 1e-3, 1e-2]}\n- {optim: b, learning_rate: [1e-3, 4e-3, 8e-3]}\n"
    )
    done = sweep(tmp_path / "out", "--plan", plan, "--timing_steps", "0", "--max_extensions", "1")
    assert "the lower end" in done.stderr
    assert ran(tmp_path / "out")[6:] == [("a", 1e-5, 1), ("b", 2.5e-4, 1), ("a", 1e-3, 2), ("b", 1e-3, 2)]
    extensions = json.loads((tmp_path / "out" / "plan.json").read_text())["extensions"]
    assert [extension["side"] for extension in extensions] == ["lower"]
    sweep(tmp_path / "out", "--plan", plan, "--timing_steps", "0", "--max_extensions", "1")
    assert len(ran(tmp_path / "out")) == 10


def test_extensions_are_bounded_and_the_edge_is_told(tmp_path):
    done = sweep(
        *(tmp_path / "out", "--optim", "a", "--learning_rate", "1e-6", "3e-6"),
        *("--seeds", "1", "--timing_steps", "0", "--max_extensions", "2"),
    )
    assert [rate for _, rate, _ in ran(tmp_path / "out")] == [1e-6, 3e-6, 9e-6, 2.7e-5]
    assert "its best learning rate is the highest that was tried" in done.stdout


def test_more_optimizers_rates_and_seeds_extend_a_sweep(tmp_path):
    options = ["--timing_steps", "0", "--max_extensions", "1", "--seeds"]
    sweep(tmp_path / "out", "--optim", "a", "--learning_rate", "1e-3", "1e-2", *options, "1")
    first = ran(tmp_path / "out")
    assert first == [("a", 1e-3, 1), ("a", 1e-2, 1), ("a", 1e-4, 1)]
    sweep(tmp_path / "out", "--optim", "a", "b", "--learning_rate", "1e-3", "1e-2", *options, "2")
    added = ran(tmp_path / "out")[3:]
    assert len(added) == len(set(added)) == 9 and {("b", 1e-4, 1), ("b", 1e-4, 2), ("a", 1e-4, 2)} <= set(added)
    done = sweep(tmp_path / "out", "--optim", "a", "--learning_rate", "1e-3", "--", "--x", code=2)
    assert "another command needs another one" in done.stderr


def test_a_killed_sweep_goes_on(tmp_path):
    """Completed runs are not repeated, the half one starts anew, and what it left running is ended."""
    file, out = tmp_path / "begun", tmp_path / "out"
    grid = ["--optim", "a", "b", "--learning_rate", "1e-3", "1e-2", "--seeds", "1", *QUICK]
    arguments = [*grid, "--", "--sleep", "2", "--begun", str(file)]
    process = start(out, *arguments)
    wait_for(lambda: file.exists() and len(begun(file)) == 3, process)
    process.kill()
    process.communicate()
    assert len(ran(out)) == 2
    half = max((out / "runs").iterdir())
    pid, _ = json.loads((half / "process.json").read_text())
    assert psutil.Process(pid).is_running()
    done = sweep(out, *arguments)
    assert f"ended runs/{half.name}, which a sweep that was killed had left running" in done.stderr
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert ran(out) == [(label, rate, 1) for rate in (1e-3, 1e-2) for label in "ab"]
    assert len(begun(file)) == 5 and begun(file)[3] == begun(file)[2]
    assert not half.exists()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_sweep_that_is_told_to_end_takes_its_runs_along(tmp_path, ending):
    file, out = tmp_path / "begun", tmp_path / "out"
    arguments = [*GRID, *QUICK, "--jobs", "2", "--", "--sleep", "100", "--begun", str(file)]
    process = start(out, *arguments)
    wait_for(lambda: file.exists() and len(begun(file)) == 2, process)
    process.send_signal(ending)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "the same command goes on" in errors and "Traceback" not in errors
    assert ran(out) == []
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(out).encode() in _read(path)]
    assert left == []


def _read(path):
    try:
        return path.read_bytes()
    except OSError:  # it has ended meanwhile
        return b""


def test_a_killed_run_starts_anew(tmp_path):
    kill = tmp_path / "killed"
    file = tmp_path / "begun"
    sweep(tmp_path / "out", *GRID, *QUICK, "--seeds", "1", "--", "--kill", str(kill), "--begun", str(file))
    assert {row["status"] for row in rows_of(tmp_path / "out")} == {"complete"}
    assert len(begun(file)) == 7 and len(ran(tmp_path / "out")) == 6


def test_failed_and_diverged_runs_are_counted_and_shown(tmp_path):
    """b fails, c diverges; the sweep goes on, and says so."""
    arguments = ["--optim", "a", "b", "c", "--learning_rate", "1e-3", "1e-2", "--seeds", "1", *QUICK]
    done = sweep(tmp_path / "out", *arguments, "--", "--fail", "b", "--nan", "c")
    statuses = {row["optimizer"]: row["status"] for row in rows_of(tmp_path / "out")}
    assert statuses == {"a": "complete", "b": "failed", "c": "diverged"}
    assert "b has no setting that came through with every seed (0 runs diverged, 2 failed)" in done.stdout
    assert "c has no setting that came through with every seed (2 runs diverged, 0 failed)" in done.stdout
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.count("something went wrong") == 2 and "| b | learning rate 0.001 | failed | — |" in report
    assert "| c | learning rate 0.01 | diverged | — |" in report
    sweep(tmp_path / "out", *arguments, "--", "--fail", "b", "--nan", "c")
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 6
    sweep(tmp_path / "out", *arguments, "--retry_failed", "--", "--fail", "b", "--nan", "c")
    assert len(ran(tmp_path / "out")) == 6  # their older attempts' folders are removed by the next sweep


def test_where_every_run_fails_so_does_the_sweep(tmp_path):
    arguments = ["--optim", "a", "--learning_rate", "1e-3", *QUICK, "--", "--fail", "a"]
    assert "every run failed" in sweep(tmp_path / "out", *arguments, code=1).stderr


def test_the_time_budget(tmp_path):
    """The first run takes 2 s; then no further one would end in time, nor is one begun."""
    file = tmp_path / "begun"
    of_script = ["--", "--sleep", "2", "--begun", str(file)]
    done = sweep(tmp_path / "out", *GRID, *QUICK, "--seeds", "1", "--time_budget", "4", *of_script)
    assert len(begun(file)) == 1 and "the time budget is used up; the same command goes on" in done.stderr
    none = sweep(tmp_path / "none", *GRID, *QUICK, "--time_budget", "0.001s")
    assert "the time budget is used up" in none.stderr and "every run failed" not in none.stderr
    assert "Not run yet (5 runs): b, learning rate 0.0001, seed 1; a, learning rate 0.001" in done.stdout


@pytest.mark.parametrize("threads", [None, "7"])
def test_jobs_share_the_cores_unless_the_user_has_said_otherwise(tmp_path, threads, monkeypatch):
    file = tmp_path / "begun"
    monkeypatch.delitem(ENVIRONMENT, "OMP_NUM_THREADS", raising=False)
    arguments = ["--optim", "a", "b", "--learning_rate", "1e-3", "--seeds", "1", "--jobs", "1000", *QUICK]
    env = {} if threads is None else {"OMP_NUM_THREADS": threads}
    sweep(tmp_path / "out", *arguments, "--", "--begun", str(file), env=env)
    assert {line.split()[3] for line in file.read_text().splitlines()} == {threads or "1"}


def test_two_sweeps_in_one_folder(tmp_path):
    arguments = [*GRID, *QUICK, "--", "--sleep", "100"]
    process = start(tmp_path / "out", *arguments)
    try:
        wait_for(lambda: list((tmp_path / "out").glob("runs/*")), process)
        assert "another sweep is running in" in sweep(tmp_path / "out", *arguments, code=2).stderr
        assert "Not run yet (12 runs)" in sweep(tmp_path / "out", "--report", script=()).stdout
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_what_the_command_sets_too_is_said(tmp_path):
    arguments = ["--optim", "a", "--learning_rate", "1e-3", "--seeds", "1", *QUICK, "--", "--seed", "5"]
    assert "--seed of the command gives way to the sweep's" in sweep(tmp_path / "out", *arguments).stderr
    assert ran(tmp_path / "out") == [("a", 1e-3, 1)]
