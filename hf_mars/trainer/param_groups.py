"""Param groups of a model, as the Trainer makes them, for training loops of one's own."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer

from ..optim import parameter_roles


def param_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Sort the trainable parameters of ``model`` into groups for a MARS optimizer, the groups of the Trainer path.

    Args:
        model: any module; a transformers model also tells which layer is its output head.
        weight_decay: λ of the parameters that the Trainer decays (all but biases and norms); the others get 0.

    Returns:
        Groups with "params", "weight_decay", "kind" ("matrix", "embedding" or "1d") and "layout" ("out_in", "in_out"
        or "conv"), matrices first; each trainable parameter in exactly one.

    Raises:
        ValueError: weight_decay is negative (from the optimizer).
    """
    roles = parameter_roles(model)
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    groups: dict[tuple, list] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            groups.setdefault((roles[param], weight_decay if name in decayed else 0.0), []).append(param)
    order = {"matrix": 0, "embedding": 1, "1d": 2}
    return [
        {"params": params, "weight_decay": decay, "kind": role.kind, "layout": role.layout}
        for (role, decay), params in sorted(groups.items(), key=lambda item: order[item[0][0].kind])
    ]
