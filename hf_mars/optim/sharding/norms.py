"""Norms of whole tensors of which each rank has a part."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .devices import exchange_device
from .parts import WHOLE, Part


def norms_of_wholes(tensors: list[Tensor], parts: list[Part]) -> list[Tensor]:
    """‖·‖₂ of each whole tensor, given this process's parts of them: 0-d tensors on their device."""
    norms = _local_norms(tensors)
    if all(part is WHOLE for part in parts):
        return norms
    squares = add_up([norm.square() for norm in norms], parts)
    return [square.sqrt_() for square in squares]


def add_up(values: list[Tensor], parts: list[Part]) -> list[Tensor]:
    """Sums over the ranks of this process's values, one for each of `parts`: tensors of one shape.

    One small all-reduce for all tensors that are spread alike; none for tensors that every rank has whole.
    """
    sums = list(values)
    alike: dict[tuple, list[int]] = {}
    for i, part in enumerate(parts):
        if part.sums_over:
            alike.setdefault((part.sums_over, values[i].dtype, values[i].device), []).append(i)
    for (groups, _, device), indices in alike.items():
        stacked = torch.stack([values[i] for i in indices])
        for group in groups:
            stacked = stacked.to(exchange_device(group, device))
            dist.all_reduce(stacked, group=group)
        for i, value in zip(indices, stacked.to(device).unbind(), strict=True):
            sums[i] = value
    return sums


def _local_norms(tensors: list[Tensor]) -> list[Tensor]:
    """In float32 or better: a half precision can neither hold the squares nor add them up."""
    if all(t.is_cpu and t.is_contiguous() for t in tensors):
        # Twice as fast as torch's norm on CPUs.
        flat = [t.view(-1) if t.itemsize >= 4 else t.view(-1).float() for t in tensors]
        return [torch.dot(t, t).sqrt() for t in flat]
    results: dict[int, Tensor] = {}
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_dtype.setdefault(torch.promote_types(tensor.dtype, torch.float32), []).append(i)
    for dtype, indices in by_dtype.items():
        values = torch._foreach_norm([tensors[i] for i in indices], 2, dtype=dtype)
        results.update(zip(indices, values, strict=True))
    return [results[i] for i in range(len(tensors))]
