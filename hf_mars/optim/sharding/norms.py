"""Norms of whole tensors of which each rank has a part."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .devices import exchange_device
from .parts import Part

Function = Callable[[Tensor], Tensor]


def norms_of_wholes(tensors: list[Tensor], parts: list[Part]) -> list[Tensor]:
    """‖·‖₂ of each whole tensor, given this process's parts of them: 0-d tensors on their device."""
    return _over_ranks(_local_norms(tensors), parts, before=_squares, after=torch.sqrt)


def norms_of_squares(squares: list[Tensor], parts: list[Part]) -> list[Tensor]:
    """‖·‖₂ of each whole tensor, given the sums of squares of this process's parts of them: 0-d tensors all."""
    return list(torch._foreach_sqrt(add_up(squares, parts)))


def add_up(values: list[Tensor], parts: list[Part]) -> list[Tensor]:
    """Sums over the ranks of this process's values, one for each of `parts`: tensors of one shape."""
    return _over_ranks(values, parts)


def _over_ranks(
    values: list[Tensor], parts: list[Part], before: Function | None = None, after: Function | None = None
) -> list[Tensor]:
    """after(Σ before(value)) over the ranks that share a parameter; the value, of one that every rank has whole.

    One small all-reduce for all tensors that are spread alike, and one launch for each function.
    """
    results = list(values)
    alike: dict[tuple, list[int]] = {}
    for i, part in enumerate(parts):
        if part.sums_over:
            alike.setdefault((part.sums_over, values[i].dtype, values[i].device), []).append(i)
    for (groups, dtype, device), indices in alike.items():
        stacked = torch.stack([values[i] for i in indices])
        stacked = stacked if before is None else before(stacked)
        for group in groups:
            stacked = stacked.to(exchange_device(group, device))
            dist.all_reduce(stacked, group=group)
        stacked = stacked if after is None else after(stacked)
        for i, result in zip(indices, stacked.to(device, dtype).unbind(), strict=True):
            results[i] = result
    return results


def _squares(norms: Tensor) -> Tensor:
    """In a precision that holds the square of every float32, where the device has one."""
    return (norms if norms.device.type == "mps" else norms.double()).square()


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
