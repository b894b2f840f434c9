"""What one process of each node does for all of its processes."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TypeVar

from accelerate.utils import gather_object
from transformers import TrainingArguments

from .checkpoints import CheckpointError

T = TypeVar("T")


class OtherNodeError(CheckpointError):
    """Another node failed, for a reason that its message tells."""


def once_per_node(args: TrainingArguments, function: Callable[[], T]) -> T:
    """Call a function in the first process of each node, and give its result to all of the node.

    Args:
        args: they know the processes.
        function: without arguments; its result, or exception, is sent to other processes by pickle.

    Raises:
        Exception: in every process of a node, what the function raised there.
        OtherNodeError: in the processes of other nodes, if it did.
    """
    outcome: tuple[T | None, Exception | None, str] | None = None
    if args.local_process_index == 0:
        try:
            outcome = function(), None, socket.gethostname()
        except Exception as error:
            outcome = None, error, socket.gethostname()
    outcomes = gather_object([outcome])
    result, failure, _ = outcomes[args.process_index - args.local_process_index]
    if failure is not None:
        raise failure
    for process, (_, failure, host) in enumerate(each or (None, None, None) for each in outcomes):
        if failure is not None:
            raise OtherNodeError(f"process {process} on {host}: {type(failure).__name__}: {failure}")
    return result
