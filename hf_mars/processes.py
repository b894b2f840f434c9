"""What the processes of a job do together before training. With one process nothing here does anything."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

from accelerate.utils import gather_object

from .corpus import UsageError


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Every process leaves this block at its end, or none does: what one process raises in it ends all of them.

    Without it, the others would wait for that process in their next collective, until a timeout of half an hour.
    The block may hold collectives only if a process that fails in it still takes part in them.

    Raises:
        UsageError: another process failed; the message says which, on which machine, and what it raised.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    reports = gather_object([failure and f"on {socket.gethostname()}: {type(failure).__name__}: {failure}"])
    if failure is not None:
        raise failure
    for process, report in enumerate(reports):
        if report:
            raise UsageError(f"process {process} {report}")


def check_same(value: Any, what: str) -> None:
    """Raise UsageError in every process if value is not equal in all; the message names it as ``what``."""
    values = gather_object([value])
    for process, other in enumerate(values):
        if other != values[0]:
            raise UsageError(
                f"{what} must be the same for all processes: {values[0]} for process 0, {other} for {process}"
            )


@contextlib.contextmanager
def main_processes_first(training_args, desc: str) -> Iterator[None]:
    """Process 0 runs the block first, then the first process of every other node, then the rest.

    What the block leaves in a cache is thus made once where the nodes share a disk, and once a node where they do not.
    """
    with training_args.main_process_first(local=False, desc=desc), training_args.main_process_first(desc=desc):
        yield
