"""How far the runs are, in one line."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from .plan import Run
from .store import Store

REFRESH = 2.0  # seconds


class Progress:
    """Counts runs, and expects of the others the time that such runs took.

    On a terminal one line that is rewritten; elsewhere a line whenever a run ends.
    """

    def __init__(self, runs: Sequence[Run], jobs: int, store: Store):
        self._runs, self._jobs, self._store = list(runs), jobs, store
        self._waiting = set(runs)
        self._running: dict[Run, float] = {}
        self._ended = 0
        self._lock = threading.Lock()
        self._terminal = sys.stderr.isatty()
        self._shown = 0.0

    def expected(self, run: Run) -> float | None:
        """Seconds that a run will take: the mean of the optimizer's runs, or of all; None before the first."""
        rows = [row for row in self._store.rows.values() if (row["kind"] == "timing") == bool(run.timing)]
        rows = [row for row in rows if row["status"] != "failed"]
        own = [row["wall_seconds"] for row in rows if row["optimizer"] == run.setting.label]
        times = own or [row["wall_seconds"] for row in rows]
        return sum(times) / len(times) if times else None

    def started(self, run: Run) -> None:
        with self._lock:
            self._waiting.discard(run)
            self._running[run] = time.monotonic()

    def skipped(self, run: Run) -> None:
        with self._lock:
            self._waiting.discard(run)

    def ended(self, run: Run, row: dict[str, Any]) -> None:
        with self._lock:
            self._running.pop(run)
            self._ended += 1
        loss = (
            row["status"]
            if row["final_loss"] is None
            else f"{row['status']}, {row['loss_of']} loss {row['final_loss']:.4f}"
        )
        problem = f" ({row['problem']}; {row['folder']}/stderr.txt)" if row["problem"] else ""
        what = "timing of " if run.timing else ""
        self._print(f"{what}{run.setting.label}, {run.setting.describe()}, seed {run.seed}: {loss}{problem}")
        if not self._terminal:
            self._print(self.line())

    def line(self) -> str:
        with self._lock:
            waiting, running = list(self._waiting), dict(self._running)
            ended = self._ended
        times = [self.expected(run) for run in [*waiting, *running]]
        left = "time left unknown until the first run has ended"
        if None not in times:
            now = time.monotonic()
            work = [t or 0.0 for t in times]
            for i, began in enumerate(running.values(), len(waiting)):
                work[i] = max(0.0, work[i] - (now - began))
            left = f"about {duration(max(sum(work) / self._jobs, *work, 0.0))} left"
        return f"{ended} of {len(self._runs)} runs ended, {len(running)} running, {left}"

    def show(self) -> None:
        if self._terminal and time.monotonic() - self._shown > REFRESH:
            self._shown = time.monotonic()
            print(f"\r\033[K{self.line()}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _print(self, text: str) -> None:
        clear = "\r\033[K" if self._terminal else ""
        print(f"{clear}{text}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """42 s, 7 min or 2 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
