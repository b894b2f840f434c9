"""What one process of each node does for all of its processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate.utils import gather_object
from transformers import TrainingArguments

T = TypeVar("T")


def once_per_node(args: TrainingArguments, function: Callable[[], T]) -> T:
    """Call a function in the first process of each node, and give its result to all of the node.

    Args:
        args: they know the processes.
        function: without arguments; its result, or exception, is sent to other processes by pickle.

    Raises:
        Exception: in every process, what the function raised in one of them.
    """
    outcome: tuple[T | None, Exception | None] | None = None
    if args.local_process_index == 0:
        try:
            outcome = function(), None
        except Exception as error:
            outcome = None, error
    outcomes = gather_object([outcome])
    own = outcomes[args.process_index - args.local_process_index]
    for _, failure in [own, *filter(None, outcomes)]:
        if failure is not None:
            raise failure
    return own[0]
