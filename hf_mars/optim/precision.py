"""Low precision: states in another dtype than the parameter, and updates of bfloat16 parameters that are not lost.

A bfloat16 parameter has 8 significant bits: at a fine-tuning learning rate most updates are smaller than half its
spacing, and plain rounding drops them. With Kahan summation the rest that rounding drops is kept in a second tensor of
the parameter's dtype, "compensation", and added the next time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .hyperparameters import dtype_of

HALF_PRECISIONS = (torch.bfloat16, torch.float16)
AVERAGES = ("exp_avg", "exp_avg_sq")


def needs_compensation(dtype: torch.dtype, group: Mapping[str, Any]) -> bool:
    """Whether such parameters are updated with Kahan summation: half precisions are, unless `kahan_sum` is False."""
    return dtype in HALF_PRECISIONS and group["kahan_sum"] is not False


def dtype_of_squares(dtype: torch.dtype) -> torch.dtype:
    """Of v for such parameters by default: float16 would make zero of the square of a gradient below 2⁻¹²."""
    return torch.float32 if dtype == torch.float16 else dtype


def needs_wide_copies(dtype: torch.dtype, group: Mapping[str, Any]) -> bool:
    """Whether such parameters are updated in full-precision copies: torch's kernels want one dtype throughout."""
    averages = dtype_of(group["state_dtype"]) or (dtype_of_squares(dtype) if group["update"] == "adamw" else dtype)
    return needs_compensation(dtype, group) or averages != dtype


@contextlib.contextmanager
def widened(
    params: list[Tensor], averages: list[list[Tensor]], compensations: list[Tensor]
) -> Iterator[tuple[list[Tensor], list[list[Tensor]]]]:
    """Parameters and moving averages to update in place in float32 or better; rounded back on leaving.

    A wide parameter is x + compensation, and is rounded back to that: twice a half precision's significant bits.

    Args:
        params: of one dtype.
        averages: lists of tensors as long as `params`.
        compensations: one per parameter, or none.
    """
    dtype = torch.promote_types(params[0].dtype, torch.float32)
    wide_params = [param.to(dtype, copy=True) for param in params]
    for wide, compensation in zip(wide_params, compensations, strict=False):
        wide.add_(compensation)
    wide_averages = [[average.to(dtype) for average in kind] for kind in averages]
    yield wide_params, wide_averages
    for param, wide in zip(params, wide_params, strict=True):
        param.copy_(wide)
    for compensation, param, wide in zip(compensations, params, wide_params, strict=False):
        compensation.copy_(wide.sub_(param))
    for kind, wide_kind in zip(averages, wide_averages, strict=True):
        for average, wide in zip(kind, wide_kind, strict=True):
            if wide is not average:
                average.copy_(wide)
