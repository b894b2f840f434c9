"""Low precision: states in another dtype than the parameter, and updates of bfloat16 parameters that are not lost.

A bfloat16 parameter has 8 significant bits: at a fine-tuning learning rate most updates are smaller than half its
spacing, and plain rounding drops them. With Kahan summation the rest that rounding drops is kept in a second tensor of
the parameter's dtype, "compensation", and added the next time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .hyperparameters import dtype_of

HALF_PRECISIONS = (torch.bfloat16, torch.float16)
AVERAGES = ("exp_avg", "exp_avg_sq")


def needs_compensation(dtype: torch.dtype, group: dict[str, Any]) -> bool:
    """Whether such parameters are updated with Kahan summation: half precisions are, unless ``kahan_sum`` is False."""
    return dtype in HALF_PRECISIONS and group["kahan_sum"] is not False


def needs_wide_copies(dtype: torch.dtype, group: dict[str, Any]) -> bool:
    """Whether such parameters are updated in full-precision copies: torch's kernels want one dtype throughout."""
    return needs_compensation(dtype, group) or dtype_of(group["state_dtype"]) not in (None, dtype)


@contextlib.contextmanager
def widened(
    params: list[Tensor], c: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
) -> Iterator[tuple[list[Tensor], list[Tensor], list[dict[str, Any]]]]:
    """(parameters, c, states) to update in place in float32 or better; what they became is rounded back on leaving.

    A wide parameter is x + compensation, and is rounded back to that: twice a half precision's significant bits.
    """
    wide_params, wide_states = [], []
    for param, state in zip(params, states, strict=True):
        dtype = torch.promote_types(param.dtype, torch.float32)
        wide = param.to(dtype, copy=True)
        wide_params.append(wide.add_(state["compensation"]) if "compensation" in state else wide)
        averages = {key: state[key].to(dtype) for key in AVERAGES if key in state}
        wide_states.append({**state, **averages})
    yield wide_params, [x.to(wide.dtype) for x, wide in zip(c, wide_params, strict=True)], wide_states
    for param, state, wide, wide_state in zip(params, states, wide_params, wide_states, strict=True):
        param.copy_(wide)
        if "compensation" in state:
            state["compensation"].copy_(wide.sub_(param))
        for key in AVERAGES:
            if key in state and wide_state[key] is not state[key]:
                state[key].copy_(wide_state[key])
