"""MARS-Lion's update (arXiv:2411.10438, Algorithm 3)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .correction import momentum
from .sharding import local


def lion(
    params: list[Tensor], c: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any], *, gamma: float
) -> None:
    """m_t = β1 m_{t−1} + (1−β1) c̃_t;  x ← x − η ( sign(m_t) + λ x ).

    Modifies the parameters and "exp_avg" in their state; not ``c``. ``gamma`` is passed on to
    :func:`~hf_mars.optim.correction.momentum`.
    """
    exp_avgs = [local(state["exp_avg"]) for state in states]
    for x, e, c_piece in cache_sized([local(param) for param in params], exp_avgs, c):
        m = momentum(e, c_piece, beta1=group["betas"][0], gamma=gamma)
        if group["weight_decay"]:
            torch._foreach_mul_(x, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(x, torch._foreach_sign(m), alpha=-group["lr"])


# Elements of a piece: three float32 pieces and a temporary one fit a core's cache, and Python's share stays small.
PIECE = 1 << 18


def cache_sized(*lists: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Cut lists of equally shaped tensors into pieces for elementwise work that passes over them several times.

    On CPUs the passes after the first then find their operands in the cache; the memory bus is the bottleneck there.
    Accelerators, sharded and strided tensors get the lists as they are.
    """
    if not all(type(t) in (Tensor, Parameter) and t.is_cpu and t.is_contiguous() for ts in lists for t in ts):
        yield lists
        return
    for tensors in zip(*lists, strict=True):
        flat = [t.view(-1) for t in tensors]
        for start in range(0, flat[0].numel(), PIECE):
            yield tuple([t[start : start + PIECE]] for t in flat)
