"""The end of a process that has used gloo, torch.distributed's backend on CPUs.

A thread of gloo's that is still busy with a collective when the interpreter shuts down asks for the interpreter's
lock, which by then ends the thread, and that ends the process: "terminate called without an active exception",
SIGABRT, after a complete run. `destroy_process_group()` does not help: DDP and accelerate hold references to the
group, so that its threads live on; and where it does end them, it waits for them with the lock held.

Imports the standard library alone, since every Python with `HF_MARS` set imports it.
"""

from __future__ import annotations

import os
import time

_THREADS = "pt_gloo_runloop"  # their name, torch 2.13
_POLLS, _SECONDS = 5, 0.05
_TASKS = "/proc/self/task"


def rest(longest: float = 30.0) -> None:
    """Wait, with the lock free, until gloo's threads have had nothing to do for a quarter of a second.

    Returns at once where there are none; on systems without /proc it waits half a second where torch.distributed has
    been used. Collectives for which another process is still missing are not waited for.

    Args:
        longest: seconds after which it returns in any case.
    """
    if not os.path.isdir(_TASKS):
        time.sleep(0.5 if "MASTER_ADDR" in os.environ else 0.0)
        return
    deadline = time.monotonic() + longest
    idle = 0
    while idle < _POLLS and time.monotonic() < deadline:
        states = _states()
        if not states:
            return
        idle = idle + 1 if states <= {"S"} else 0
        time.sleep(_SECONDS)


def _states() -> set[str]:
    """The kernel's states of gloo's threads: S where one waits, R where it runs or waits for a processor."""
    states = set()
    for task in os.listdir(_TASKS):
        try:
            with open(f"{_TASKS}/{task}/stat") as file:
                name, _, values = file.read().partition("(")[2].rpartition(")")
        except OSError:  # it has ended since
            continue
        if name == _THREADS:
            states.add(values.split()[0])
    return states
