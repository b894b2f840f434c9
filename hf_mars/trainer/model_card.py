"""Model cards (`Trainer.create_model_card`, `push_to_hub`) that state MARS's hyperparameters."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from ..optim import MarsShampoo
from ..optim.groups import KINDS, Group
from ..optim.mars import Mars
from .names import mars_name
from .options import hyperparameters, optimizer_class

_SHOWN = ("lr", "betas", "eps", "weight_decay", "gamma", "max_norm", "exact")
_SHOWN_OF_UPDATE = {
    "adamw": _SHOWN,
    "lion": tuple(name for name in _SHOWN if name != "eps"),
    "shampoo": (*(name for name in _SHOWN if name != "eps"), "ns_steps", "adjust_lr_fn"),
}
_SHOWN_IF_SET = ("last_grad_dtype", "state_dtype", "kahan_sum")


def describe_optimizer_of(trainer: Trainer) -> str | None:
    """`describe` the optimizer that a Trainer has or is going to make; None if it is not MARS's."""
    optimizer: Any = trainer.optimizer
    if optimizer is None:
        name = mars_name(trainer.args)
        optimizer = None if name is None else _optimizer_to_be(name, trainer.args)
    mars = mars_inside(optimizer)
    return None if mars is None else describe(mars)


def mars_inside(optimizer: Any) -> Mars | None:
    """The MARS optimizer under the wrappers of accelerate and DeepSpeed; None if there is none."""
    while optimizer is not None and not isinstance(optimizer, Mars):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def _optimizer_to_be(name: str, args: TrainingArguments) -> Mars:
    """The optimizer that a Trainer makes when training starts, here on one small parameter of each kind."""
    optimizer_cls = optimizer_class(name)
    kinds = KINDS if optimizer_cls is MarsShampoo else ("matrix", "1d")  # the others know no embeddings
    groups: list[dict[str, Any]] = [
        {"params": [torch.zeros(1, 1)], "kind": kind, "weight_decay": args.weight_decay} for kind in kinds
    ]
    groups[-1].update(params=[torch.zeros(1)], weight_decay=0.0)
    return optimizer_cls(groups, **hyperparameters(args))


def describe(optimizer: Mars) -> str:
    """One line: the class, and the settings of each kind of parameter, those that the schedule starts from.

    Weight decay is the largest of the kind's groups; the Trainer decays neither biases nor norms.
    """
    parts: dict[str, list[str]] = {}
    # Groups that are empty from the start say nothing; ZeRO-3 empties all.
    used = [group for group in optimizer.param_groups if group["params"]] or optimizer.param_groups
    for kind in KINDS:
        groups = [group for group in used if group["kind"] == kind]
        if not groups:
            continue
        parts.setdefault(shown_settings(optimizer, groups), []).append(kind)
    listed = "; ".join(f"{' and '.join(kinds)} parameters: {part}" for part, kinds in parts.items())
    return f"{type(optimizer).__name__} (MARS, arXiv:2411.10438). {listed}"


def shown_settings(optimizer: Mars, groups: list[Group]) -> str:
    """In words, the update of groups of one kind and its hyperparameters, as the schedule starts from them."""
    settings = dict(groups[0], lr=groups[0].get("initial_lr", groups[0]["lr"]))
    settings["weight_decay"] = max(group["weight_decay"] for group in groups)
    update = settings["update"]
    names = [*_SHOWN_OF_UPDATE[update], *(name for name in _SHOWN_IF_SET if settings[name] is not None)]
    if optimizer.adjusts_lr and settings["gamma"] > 0:
        names.append("adjust_lr_fn")
    return f"{update} with {', '.join(f'{name}={_plain(settings[name])}' for name in names)}"


def _plain(value: Any) -> Any:
    if isinstance(value, list):  # betas out of a checkpoint of FSDP2's
        return tuple(value)
    return value.item() if isinstance(value, torch.Tensor) else value
