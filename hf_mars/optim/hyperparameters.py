"""Allowed values of the hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .groups import KINDS, LAYOUTS


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _not_negative(value: Any) -> bool:
    return _number(value) and value >= 0


def _rate(value: Any) -> bool:
    """Also a tensor, whose value the host need not know: captured CUDA graphs read it anew in every replay."""
    return _not_negative(value) or (isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point())


def _betas(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(_number(b) and 0 <= b < 1 for b in value)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


# What states may be kept in: float16's range is too small for squares of gradients.
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def dtype_of(value: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that a setting names; None for None, and for a name of none."""
    return _DTYPES.get(value) if isinstance(value, str) else value


def dtype_name(value: torch.dtype | str | None) -> str | None:
    """The name of a dtype, in which param_groups keep it: FSDP2's checkpoints take no dtypes."""
    if value is None or isinstance(value, str):
        return value
    return next(name for name, dtype in _DTYPES.items() if dtype == value)


_STATE_DTYPE = ("float32, bfloat16 or None", lambda v: v is None or dtype_of(v) in _DTYPES.values())

# One row a hyperparameter: what it must be, and the test. The trainer's options use the same rows.
RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("a number >= 0", _rate),
    "betas": ("two numbers, each in [0, 1)", _betas),
    "eps": ("a number >= 0", _not_negative),
    "weight_decay": ("a number >= 0", _not_negative),
    "gamma": ("a number in [0, 1]", lambda v: _number(v) and 0 <= v <= 1),
    "max_norm": ("a number > 0, or None", lambda v: v is None or (_number(v) and v > 0)),
    "exact": ("True or False", _flag),
    "lr_1d": ("a number >= 0, or None", lambda v: v is None or _not_negative(v)),
    "betas_1d": ("two numbers, each in [0, 1)", _betas),
    "optimize_1d": ("True or False", _flag),
    "last_grad_dtype": _STATE_DTYPE,
    "state_dtype": _STATE_DTYPE,
    "kahan_sum": ("True, False or None", lambda v: v is None or _flag(v)),
    "skip_nonfinite": ("True or False", _flag),
    "foreach": ("True, False or None", lambda v: v is None or _flag(v)),
    "fused": ("True, False or None", lambda v: v is None or _flag(v)),
    "ns_steps": ("an integer in [1, 100], or None", lambda v: v is None or (type(v) is int and 1 <= v <= 100)),
    "adjust_lr_fn": ("'original' or 'match_rms_adamw'", lambda v: v in ("original", "match_rms_adamw")),
    "orthogonalize_embeddings": ("True or False", _flag),
    "kind": (f"one of {', '.join(KINDS)}", lambda v: v in KINDS),
    "layout": (f"one of {', '.join(LAYOUTS)}", lambda v: v in LAYOUTS),
}


def check_hyperparameters(settings: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the argument, the value and the allowed range, if a setting is not allowed."""
    for name, value in settings.items():
        if name in RANGES:
            allowed, is_allowed = RANGES[name]
            if not is_allowed(value):
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
    if settings.get("fused") and settings.get("foreach"):
        raise ValueError("fused and foreach cannot both be True: they choose between kernels")
