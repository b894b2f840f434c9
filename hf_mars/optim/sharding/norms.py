"""Norms of whole tensors of which each rank has a part."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..host import reads_are_free
from .devices import exchange_device
from .parts import Part

Function = Callable[[Tensor], Tensor]
BLOCK = 1 << 12  # elements whose squares are added up in their own precision


def whole_value(norm: Tensor | float) -> Tensor | float:
    """A norm that may be a DTensor, as torch.nn.utils.clip_grad_norm_ makes it, as a plain one."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


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
    return norms.to(_wider(norms)).square()


def _local_norms(tensors: list[Tensor]) -> list[Tensor]:
    """In float32 or better: a half precision can neither hold the squares nor add them up.

    Squares of float32 numbers from 1e19 on need float64.
    """
    if all(t.is_contiguous() for t in tensors) and reads_are_free(tensors):
        # Twice as fast as torch's norm on CPUs.
        flat = [t.view(-1) if t.itemsize >= 4 else t.view(-1).float() for t in tensors]
        squares = [_sum_of_squares(t) for t in flat]
        return [
            square.sqrt() if math.isfinite(square) else torch.linalg.vector_norm(t, dtype=torch.float64).to(t.dtype)
            for t, square in zip(flat, squares, strict=True)
        ]
    results: dict[int, Tensor] = {}
    alike: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, tensor in enumerate(tensors):
        alike.setdefault((torch.promote_types(tensor.dtype, torch.float32), tensor.device), []).append(i)
    for (dtype, _), indices in alike.items():
        chosen = [tensors[i] for i in indices]
        norms = torch._foreach_norm(chosen, 2, dtype=torch.promote_types(dtype, _wider(chosen[0])))
        results.update(zip(indices, torch.stack(norms).to(dtype).unbind(), strict=True))
    return [results[i] for i in range(len(tensors))]


def _sum_of_squares(vector: Tensor) -> Tensor:
    """Block by block: a running sum of millions of float32 numbers loses what is added to it."""
    blocks, rest = vector.split([vector.numel() // BLOCK * BLOCK, vector.numel() % BLOCK])
    sums = torch.linalg.vector_norm(blocks.view(-1, BLOCK), dim=1).square_()
    return (sums.sum(dtype=torch.float64) + torch.dot(rest, rest)).to(vector.dtype)


def _wider(tensor: Tensor) -> torch.dtype:
    """What squares of a tensor's elements fit in, where its device has it."""
    return torch.float64 if tensor.device.type in ("cpu", "cuda") else torch.float32
