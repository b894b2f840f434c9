"""Steps that the processes of a job take together before training. With one process they do nothing."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import gather_object

from hf_mars.trainer.gloo import rest

from .errors import UsageError

if TYPE_CHECKING:
    from transformers import TrainingArguments


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Every process leaves this block at its end, or none does: an exception in one of them ends all.

    Without it, the others would wait for that process in their next collective, until a timeout of half an hour.
    The block may hold collectives only if a process that fails in it still takes part in them.

    Raises:
        UsageError: another process failed; the message names it, its machine and its exception.
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


def check_all_are_seen(world_size: int) -> None:
    """Refuse processes that a launcher has started as one run and that would train one by one, in the same folder.

    Args:
        world_size: processes of the run, as TrainingArguments see it.

    Raises:
        UsageError: the launcher says (WORLD_SIZE) that there are others.
    """
    launched = os.environ.get("WORLD_SIZE", "1")
    if world_size == 1 and launched.isdecimal() and int(launched) > 1:
        raise UsageError(
            f"WORLD_SIZE={launched}: the launcher has started {launched} processes, but each sees only itself, since "
            "there is no GPU for it; give --use_cpu to train on CPUs"
        )


def check_same(value: Any, what: str) -> None:
    """Raise UsageError in every process if value is not equal in all; the message calls it `what`."""
    values = gather_object([value])
    for process, other in enumerate(values):
        if other != values[0]:
            raise UsageError(
                f"{what} must be the same for all processes: {values[0]} for process 0, {other} for {process}"
            )


@contextlib.contextmanager
def main_processes_first(training_args: TrainingArguments, desc: str) -> Iterator[None]:
    """Process 0 runs the block first, then the first process of every other node, then the rest.

    Entries that the block makes in a cache are thus made once where the nodes share a disk, else once per node.
    """
    with training_args.main_process_first(local=False, desc=desc), training_args.main_process_first(desc=desc):
        yield


def leave_together() -> None:
    """Wait for all processes, at the end of a run, and for gloo's threads: see `hf_mars.trainer.gloo`."""
    PartialState().wait_for_everyone()
    rest()
