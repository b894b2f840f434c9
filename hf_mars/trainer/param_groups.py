"""Param groups of a model, as the Trainer makes them, for training loops of one's own."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import Parameter
from transformers import Trainer

from ..optim import ParameterRole, parameter_roles
from ..optim.groups import KINDS


def param_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Sort the trainable parameters of `model` into the groups that a MARS optimizer gets from the Trainer.

    Args:
        model: any module; a transformers model also tells which layer is its output head.
        weight_decay: λ of the parameters that the Trainer decays (all but biases and norms), at least 0, which the
            optimizer checks; the others get 0.

    Returns:
        Groups with "params", "weight_decay", "kind" ("matrix", "embedding" or "1d") and "layout" ("out_in", "in_out"
        or "conv"), matrices first; each trainable parameter is in exactly one.
    """
    roles = parameter_roles(model)
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # it makes no use of self
    groups: dict[tuple[ParameterRole, float], list[Parameter]] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            groups.setdefault((roles[param], weight_decay if name in decayed else 0.0), []).append(param)
    return [
        {"params": params, "weight_decay": decay, "kind": role.kind, "layout": role.layout}
        for (role, decay), params in sorted(groups.items(), key=lambda item: KINDS.index(item[0][0].kind))
    ]
