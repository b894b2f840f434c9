"""One line per training that says what is in effect, shown by every Trainer whose optimizer is MARS's."""

from __future__ import annotations

import logging
import math
import sys
from typing import Any
from weakref import WeakSet

from transformers import TrainingArguments

from ..optim.groups import KINDS
from ..optim.mars import Mars
from .defaults import transformers_default
from .model_card import mars_inside, shown_settings
from .names import mars_name

logger = logging.getLogger(__name__)

_summarized: WeakSet[Mars] = WeakSet()


def show_once(args: TrainingArguments, optimizer: Any) -> None:
    """Show the `summary` of an optimizer that has taken a step, once, in the processes that log.

    By then a checkpoint has been loaded, and it is known which execution takes the steps. The line goes to the log at
    INFO; to stderr where the log would drop that.

    Args:
        args: `should_log` and the hyperparameters that the user gave.
        optimizer: any; others than MARS's, and steps that a gradient scaler has skipped, are passed over.
    """
    mars = mars_inside(optimizer)
    if mars is None or mars in _summarized or not (mars.executions and args.should_log):
        return
    _summarized.add(mars)
    line = summary(mars, args)
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info(line)
    else:
        print(line, file=sys.stderr)


def summary(optimizer: Mars, args: TrainingArguments | None = None) -> str:
    """One line: the variant, and per kind of parameter its size, its hyperparameters and what takes its steps.

    Args:
        optimizer: has taken a step; else nothing is said of what takes them.
        args: those that it was made from. Where other values are in effect than theirs, the line ends with them.
    """
    name = mars_name(args) if args is not None else None
    parts = []
    for kind in KINDS:
        tensors, elements = optimizer.sizes.get(kind, (0, 0))
        if tensors:  # ZeRO-3 empties the groups
            groups = [group for group in optimizer.param_groups if group["kind"] == kind]
            size = f"{tensors:,} {kind} tensor{'s' * (tensors != 1)} ({elements:,} parameters)"
            by = f" by {optimizer.executions[kind]}" if kind in optimizer.executions else ""
            parts.append(f"{size}: {shown_settings(optimizer, groups)}{by}")
    text = f"{type(optimizer).__name__}{f' (optim={name})' if name else ''}: {'; '.join(parts)}"
    overridden = _not_in_effect(optimizer, args) if args is not None and name is not None else []
    if overridden:
        text += f". Not in effect of TrainingArguments: {', '.join(overridden)}"
    return text


def _not_in_effect(optimizer: Mars, args: TrainingArguments) -> list[str]:
    """Fields of the arguments that people would take for granted: betas, and the learning rate of every parameter."""
    used = [group for group in optimizer.param_groups if optimizer.sizes[group["kind"]][0]]
    fields = []
    for i, field in enumerate(("adam_beta1", "adam_beta2")):
        if used and used[0]["betas"][i] != getattr(args, field):
            reason = " (transformers' default counts as not given)" * (
                getattr(args, field) == transformers_default(field)
            )
            fields.append(f"{field}={getattr(args, field)}{reason}")
    other = [g["kind"] for g in used if not math.isclose(g.get("initial_lr", g["lr"]), args.learning_rate)]
    if other:
        kinds = " and ".join(kind for kind in KINDS if kind in other)
        fields.append(f"learning_rate={args.learning_rate} for {kinds} tensors")
    return fields
