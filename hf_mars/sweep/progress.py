"""How far a sweep is, in one line."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

from .plan import Run
from .store import Store

REFRESH = 2.0  # seconds


class Progress:
    """Counts runs, and expects of those to come the time that such runs took.

    On a terminal one line that is rewritten; elsewhere a line whenever a run ends.

    Args:
        runs: all that are to be made now or were made before, whose rows the store has.
        later: stand-ins for runs that will follow.
        jobs: runs at a time; of timing runs there is one at a time.
        store: where the rows are.
    """

    def __init__(self, runs: Iterable[Run], later: Iterable[Run], jobs: int, store: Store):
        rows = store.rows
        self._store, self._jobs = store, jobs
        self._waiting = [run for run in runs if run.key not in rows]
        self._later = list(later)
        self._total = len(list(runs)) + len(self._later)
        self._ended = self._total - len(self._later) - len(self._waiting)
        self._running: dict[Run, float] = {}
        self._lock = threading.Lock()
        self._terminal = sys.stderr.isatty()
        self._shown = 0.0

    def expected(self, run: Run) -> float | None:
        """Seconds that a run will take: the mean of its optimizer's runs, or of all; None before the first."""
        rows = [row for row in self._store.rows.values() if row["kind"] == "run" and row["status"] != "failed"]
        rows = [row for row in rows if row["optimizer"] == run.setting.label] or rows
        if not rows:
            return None
        times = [row["wall_seconds"] for row in rows]
        if run.timing:  # starting up, and some of the steps
            shares = [min(1.0, run.steps / (row["steps"] or 1)) for row in rows]
            times = [
                t - (row["seconds"] or 0.0) * (1 - share) for t, share, row in zip(times, shares, rows, strict=True)
            ]
        return float(sum(times) / len(times))

    def started(self, run: Run) -> None:
        with self._lock:
            if run in self._waiting:
                self._waiting.remove(run)
            self._running[run] = time.monotonic()

    def skipped(self, run: Run) -> None:
        with self._lock:
            self._waiting.remove(run)

    def ended(self, run: Run, row: dict[str, Any]) -> None:
        with self._lock:
            self._running.pop(run)
            self._ended += 1
        what = f"{'timing of ' if run.timing else ''}{run.setting.label}, {run.setting.describe()}, seed {run.seed}"
        loss = "" if row["final_loss"] is None else f", {row['loss_of']} loss {row['final_loss']:.4f}"
        if run.timing:
            loss = "" if row["seconds_per_step"] is None else f", {row['seconds_per_step']:.4g} s per step"
        problem = f": {row['problem']}, see {row['folder']}/stderr.txt" if row["problem"] else ""
        self._print(f"{what}: {row['status']}{loss}{problem}", end="\n")

    def line(self) -> str:
        with self._lock:
            running, ended = dict(self._running), self._ended
            to_come = [*running, *self._waiting, *self._later]
        times = [self.expected(run) for run in to_come]
        left = "time left unknown until the first has ended"
        if None not in times:
            now = time.monotonic()
            work = [
                max(0.0, (t or 0.0) - (now - running.get(run, now))) for run, t in zip(to_come, times, strict=True)
            ]
            together = [w for run, w in zip(to_come, work, strict=True) if not run.timing]
            alone = sum(work) - sum(together)
            left = f"about {duration(alone + max([sum(together) / self._jobs, *together]))} left"
        now_running = f", {len(running)} running" if running else ""
        return f"{ended} of {self._total} runs ended{now_running}, {left}"

    def show(self) -> None:
        if self._terminal and time.monotonic() - self._shown > REFRESH:
            self._shown = time.monotonic()
            self._print("", end="")

    def close(self) -> None:
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _print(self, text: str, end: str) -> None:
        """The text, and how far the sweep is: beside it in a log, in the line below it on a terminal."""
        if self._terminal:
            print(f"\r\033[K{text}{end}{self.line()}", end="", file=sys.stderr, flush=True)
        else:
            print(f"[{self.line()}] {text}", end=end, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """42 s, 7 min or 2 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
