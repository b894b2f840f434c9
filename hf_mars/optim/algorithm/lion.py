"""MARS-Lion's update (arXiv:2411.10438, Algorithm 3)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .correction import momentum, move


def lion(
    params: list[Tensor],
    c: list[Tensor],
    exp_avgs: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    weight_decay: float,
    gamma: float,
    flag: Tensor | None = None,
) -> None:
    """m_t = β1 m_{t−1} + (1−β1) c̃_t;  x ← x − η ( sign(m_t) + λ x ).

    Modifies the parameters and `exp_avgs`; not `c`. `gamma` is for `correction.momentum`, `flag` for
    `correction.move`.
    """
    for x, e, c_piece in pieces_of(params, exp_avgs, c):
        m = momentum(e, c_piece, beta1=beta1, gamma=gamma)
        move(x, list(torch._foreach_sign(m)), rates=[lr] * len(x), decay=1 - lr * weight_decay, flag=flag)


# Elements of a piece: three float32 pieces and a temporary one fit a core's cache, and Python's share stays small.
PIECE = 1 << 18
PIECE_ON_ACCELERATORS = 1 << 24


def pieces_of(*lists: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Cut lists of equally shaped tensors into pieces for elementwise work that passes over them several times.

    On CPUs the passes after the first then find their operands in the cache; the memory bus is the bottleneck there.
    On accelerators pieces are large, and keep temporary tensors small beside the parameters. The compiler fuses the
    passes by itself.
    """
    if torch.compiler.is_compiling():
        yield lists
        return
    is_cpu = all(t.is_cpu for ts in lists for t in ts)
    piece = PIECE if is_cpu else PIECE_ON_ACCELERATORS
    small: list[tuple[Tensor, ...]] = []  # tensors for one piece
    elements = 0
    for tensors in zip(*lists, strict=True):
        if tensors[0].numel() >= piece and all(t.is_contiguous() for t in tensors):
            for pieces in zip(*(t.view(-1).split(piece) for t in tensors), strict=True):
                yield tuple([t] for t in pieces)
            continue
        if small and elements + tensors[0].numel() > piece:
            yield tuple(map(list, zip(*small, strict=True)))
            small, elements = [], 0
        small.append(tensors)
        elements += tensors[0].numel()
    if small:
        yield tuple(map(list, zip(*small, strict=True)))
