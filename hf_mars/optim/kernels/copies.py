"""Copies of many tensors in one launch: what exact mode moves parameters to x_{t−1} and back with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .launch import OPTIONS, Kernels
from .plan import ALIGNMENT, BLOCK, Table

# By the first tensor: the stream, the addresses, and the table of the last launch.
_tables: WeakIdKeyDictionary = WeakIdKeyDictionary()


def swap(kernels: Kernels, tensors: list[Tensor], others: list[Tensor]) -> None:
    """Let `tensors` and `others` change places: 4 words per element."""
    table = _table_of(tensors, others)
    with torch.cuda.device_of(table.table):
        kernels.copies.swap[(table.blocks,)](
            *(table.table, table.tensor_of_block, table.stride), **_options(table, tensors[0])
        )
    torch.autograd.graph.increment_version([*tensors, *others])


def keep(kernels: Kernels, tensors: list[Tensor], others: list[Tensor], flag: Tensor | None) -> None:
    """Copy `tensors` into `others`, unless `flag` is raised: 2 words per element."""
    table = _table_of(tensors, others)
    with torch.cuda.device_of(table.table):
        kernels.copies.keep[(table.blocks,)](
            *(table.table, table.tensor_of_block, table.stride, table.zero if flag is None else flag),
            **_options(table, tensors[0]),
        )
    torch.autograd.graph.increment_version(others)


def _table_of(tensors: list[Tensor], others: list[Tensor]) -> Table:
    device = tensors[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    sizes = list(map(Tensor.numel, tensors))
    addresses = {"X": list(map(Tensor.data_ptr, tensors)), "PREV": list(map(Tensor.data_ptr, others))}
    known = _tables.get(tensors[0])
    if known is not None and known[:3] == (stream, sizes, addresses):
        return known[3]
    is_aligned = not any(address % ALIGNMENT for row in addresses.values() for address in row)
    table = Table(sizes, addresses, is_aligned, device)
    _tables[tensors[0]] = stream, sizes, addresses, table
    return table


def _options(table: Table, like: Tensor) -> dict:
    import triton.language as tl

    integer = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}[like.itemsize]
    return {"DTYPE": integer, "ALIGNED": table.is_aligned, "BLOCK": BLOCK, **OPTIONS}
