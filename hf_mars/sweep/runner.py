"""Runs as processes: started, waited for, read; some at a time, within the time budget."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from ..trainer.names import RUN_LOG_VARIABLE
from .command import through_hf_mars
from .curves import diverged, final_loss, read_log, seconds_per_step
from .errors import SweepError
from .plan import Run
from .progress import Progress
from .store import Store

RUNS = "runs"
PROCESS = "process.json"  # in a run's folder: the number of its process, and when that began
STDERR_LINES = 15
_KILLED = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # somebody ended it: no fault of the run's


class Stopped(Exception):
    """The sweep was told to end."""


class Runner:
    """Makes runs of one command.

    Args:
        command: the user's.
        folder: the sweep's output folder.
        store: where rows go.
        jobs: runs at a time.
        deadline: `time.monotonic()` after which no run shall last; None for no limit.
        keep_outputs: whether the runs' output_dirs stay.
        commit: the git commit of the user's scripts, or None.
    """

    def __init__(
        self,
        command: list[str],
        folder: Path,
        store: Store,
        *,
        jobs: int,
        deadline: float | None,
        keep_outputs: bool,
        commit: str | None,
    ):
        self._command = through_hf_mars(command)
        self._folder, self._store, self._jobs, self._deadline = folder, store, jobs, deadline
        self._keep_outputs, self._commit = keep_outputs, commit
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stop = threading.Event()
        self._refusal: SweepError | None = None

    def make(
        self,
        runs: Sequence[Run],
        *,
        only: Sequence[Run] | None = None,
        later: Sequence[Run] = (),
        jobs: int | None = None,
    ) -> list[Run]:
        """Make those of the runs that have not been made, and wait for them.

        Args:
            runs: all so far.
            only: those of them to be made now; None for all.
            later: stand-ins for what will be run after them; timing runs among them are left the time to be made.
            jobs: runs at a time, if not the sweep's.

        Returns:
            What there was no time for.

        Raises:
            SweepError: the script refuses its arguments (it exits with 2).
            KeyboardInterrupt: after the runs under way were ended.
        """
        rows = self._store.rows
        missing = [run for run in (runs if only is None else only) if run.key not in rows]
        if not missing:
            return []
        jobs = self._jobs if jobs is None else jobs
        left: list[Run] = []
        progress = Progress(runs, later, jobs, self._store)
        timing = [run for run in later if run.timing]
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(self._make_one, run, jobs, timing, progress, left) for run in missing]
            try:
                while not all(future.done() for future in futures):
                    progress.show()
                    time.sleep(0.2)
            except BaseException:
                self.stop()
                raise
        progress.close()
        if self._refusal is not None:
            raise self._refusal
        for future in futures:
            if not isinstance(future.exception(), (Stopped, type(None))):
                future.result()
        return left

    def stop(self) -> None:
        """End the runs under way; their threads return."""
        self._stop.set()
        with self._lock:
            for process in self._processes:
                _kill(process.pid, signal.SIGTERM)

    def _make_one(self, run: Run, jobs: int, timing: list[Run], progress: Progress, left: list[Run]) -> None:
        for attempt in (1, 2):  # a run that somebody kills starts anew, once
            if self._stop.is_set():
                raise Stopped
            needed = sum(progress.expected(each) or 0.0 for each in [run, *timing])
            if self._deadline is not None and time.monotonic() + needed > self._deadline:
                progress.skipped(run)
                left.append(run)
                return
            trial = self._store.begin(run)
            row = None
            try:
                progress.started(run)
                row = self._run(run, trial.number, jobs)
            finally:
                if row is None or self._refusal is not None:
                    self._store.give_up(trial)
                    row = None
            if row is None:
                raise Stopped
            if row["exit_code"] in [-number for number in _KILLED] and attempt == 1:
                self._store.give_up(trial)
                continue
            self._store.end(trial, row)
            progress.ended(run, row)
            return

    def _run(self, run: Run, number: int, jobs: int) -> dict[str, Any] | None:
        """The row of a run; None if the sweep was stopped meanwhile."""
        # With the trial's number it is one that no earlier attempt writes to, which may still be running.
        folder = self._folder / RUNS / f"{number:04}-{run.setting.slug()}-seed{run.seed}"
        folder.mkdir(parents=True)
        log = folder / "log.jsonl"
        log.touch()
        command = [*self._command, *run.arguments(), "--output_dir", str(folder / "output")]
        environment = {**os.environ, RUN_LOG_VARIABLE: str(log.resolve())}
        if jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // jobs)))
        began, clock = time.strftime("%Y-%m-%dT%H:%M:%S%z"), time.monotonic()
        code = self._wait(command, environment, folder)
        if code is None:
            return None
        errors = (folder / "stderr.txt").read_text(errors="replace").splitlines()
        if code == 2:  # argparse's, and python's own for a missing file
            last = next((line for line in reversed(errors) if line.strip()), "no message")
            self._refusal = SweepError(f"the command refuses its arguments (exit code 2): {last}")
            self.stop()
            return None
        if not self._keep_outputs:
            shutil.rmtree(folder / "output", ignore_errors=True)
        return {
            "kind": "timing" if run.timing else "run",
            "optimizer": run.setting.label,
            "arguments": dict(run.setting.arguments),
            "seed": run.seed,
            **_outcome(code, read_log(log), errors),
            "wall_seconds": round(time.monotonic() - clock, 2),
            "jobs": jobs,
            "began": began,
            "folder": str(folder.relative_to(self._folder)),
            "command": command,
            "git_commit": self._commit,
        }

    def _wait(self, command: list[str], environment: dict[str, str], folder: Path) -> int | None:
        with (folder / "stdout.txt").open("wb") as out, (folder / "stderr.txt").open("wb") as err:
            try:
                # A session of its own, so that launchers' workers can be ended with it.
                process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
                )
            except OSError as error:
                self._refusal = SweepError(f"cannot start {command[0]!r}: {error.strerror}")
                self.stop()
                return None
            with self._lock:
                self._processes.add(process)
            (folder / PROCESS).write_text(json.dumps([process.pid, _began(process.pid)]))
            try:
                while process.poll() is None and not self._stop.is_set():
                    time.sleep(0.05)
                if process.poll() is None:
                    _end(process.pid)
                    process.wait()
                    return None
            finally:
                with self._lock:
                    self._processes.discard(process)
        return None if self._stop.is_set() else process.returncode


def remove_abandoned(folder: Path, rows: Iterable[dict[str, Any]]) -> list[str]:
    """Remove the folders of runs that a killed sweep left behind, and end those that go on by themselves.

    Returns:
        The folders of those.
    """
    kept = {row["folder"] for row in rows}
    ended = []
    for path in sorted((folder / RUNS).glob("*")):
        name = str(path.relative_to(folder))
        if name in kept:
            continue
        with contextlib.suppress(OSError, ValueError):
            pid, began = json.loads((path / PROCESS).read_text())
            if began is not None and _began(pid) == began:
                _end(pid)
                ended.append(name)
        shutil.rmtree(path, ignore_errors=True)
    return ended


def _began(pid: int) -> float | None:
    """When a process began, which tells it from a later one of the same number; None if there is none."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    return None


def _outcome(code: int, log: dict[str, Any], errors: list[str]) -> dict[str, Any]:
    """The part of a row that the run itself decides."""
    final = final_loss(log) if log else None
    begin = log.get("begin", {})
    problem = None
    if code != 0:
        problem = f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
    elif "end" not in log:
        problem = "its script trained with no Trainer of transformers, or not to the end"
    elif final is None:
        problem = "it logged no loss"
    status = "failed" if problem else "diverged" if diverged(log) else "complete"
    finite = final is not None and math.isfinite(final[0])
    training = log.get("training", [])
    return {
        "status": status,
        "exit_code": code,
        "problem": problem,
        "stderr": errors[-STDERR_LINES:] if problem else [],
        "final_loss": final[0] if final is not None and finite else None,
        "loss_of": final[1] if final is not None else None,
        "steps": log.get("end"),
        "max_steps": begin.get("max_steps"),
        "seconds": training[-1].seconds if training else None,
        "seconds_per_step": seconds_per_step(training),
        "state_bytes": log.get("state_bytes"),
        "parameters": begin.get("parameters"),
        "initial": begin.get("initial"),
        "versions": begin.get("versions"),
        "hardware": begin.get("hardware"),
        "training": _strict(training),
        "evaluation": _strict(log.get("evaluation", [])),
    }


def _strict(points: list[Any]) -> list[list[float | None]]:
    """[step, loss, seconds, tokens] of each; None for what is no number, which JSON does not have."""
    return [[None if x is None or not math.isfinite(x) else round(x, 6) for x in point] for point in points]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _kill(pid: int, number: int) -> None:
    """A run and all that it has started: each has a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _end(pid: int) -> None:
    """Ask a run, of this sweep or of one that was killed, and after ten seconds make it."""
    _kill(pid, signal.SIGTERM)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.wait_procs([psutil.Process(pid)], timeout=10)
    _kill(pid, signal.SIGKILL)
