"""What the Triton kernels are told of tensors, made once and kept for as long as nothing about the tensors changes.

A `Plan` is of one batch, on the host; a `Table` of the plans whose tensors are updated by the same launches, on the
device. In most steps the host only finds that all is as it was: it compares identities and addresses, and uploads
nothing. A plan does not keep states alive.
"""

from __future__ import annotations

import functools
import itertools
import operator
import weakref
from array import array
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.weak import WeakIdKeyDictionary

from ..batch import Batch
from ..form import Form

BLOCK = 2048  # elements that a program updates; each of its threads has two 16-byte loads per operand under way
ALIGNMENT = 16  # bytes

# Rows of the table that are addresses, in triton_common.py's order.
ROWS = ("X", "G", "PREV", "M", "V", "STEP", "COMPENSATION")

DTYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


Rows = dict[str, list[Tensor]]


def rows_of(batch: Batch) -> Rows:
    """The kernels' operands by the names of their rows."""
    rows = {
        "X": batch.params,
        "G": batch.grads,
        "PREV": batch.previous_grads or [],
        "M": batch.exp_avgs,
        "V": batch.exp_avg_sqs,
        "STEP": batch.steps,
        "COMPENSATION": batch.compensations,
    }
    return {name: row for name, row in rows.items() if row}


class Plan:
    """Which tensors of a batch the kernels take, and their addresses.

    Attributes:
        why_not: why the kernels take none of them; None if they can.
        taken: places in the batch of those that they take.
        is_of_matrices: whether those of one shape are to lie next to each other in a table.
        shapes: of the tensors, in that case.
        left: places of the others, which are strided in ways that no flat memory is.
        dtypes: of each row.
        sizes: elements of each tensor.
        addresses: of each row.
        moves: how often rows have had other addresses.
        unaligned: places of those not aligned to 16 bytes, which are moved element by element.
        tables: see `tables_of`.
    """

    def __init__(self, batch: Batch):
        rows = rows_of(batch)
        self.dtypes = {name: row[0].dtype for name, row in rows.items()}
        self.sizes = list(map(Tensor.numel, batch.params))
        self.is_of_matrices = batch.group["update"] == "shampoo"
        self.shapes = [tuple(param.shape) for param in batch.params] if self.is_of_matrices else []
        self.why_not = _why_not(rows, batch)
        flat = [_is_flat([row[i] for name, row in rows.items() if name != "STEP"]) for i in range(len(self.sizes))]
        self.taken = [i for i, is_flat in enumerate(flat) if is_flat]
        self.left = [i for i, is_flat in enumerate(flat) if not is_flat]
        self.tables: tuple | None = None
        self.addresses = {name: list(map(Tensor.data_ptr, row)) for name, row in rows.items()}
        self.moves = 0
        self._made_rows = [name for name in rows if not batch.is_whole or name in _made_rows(batch)]
        self._kept_unaligned = self._unaligned([name for name in rows if name not in self._made_rows])
        self.unaligned = self._kept_unaligned | self._unaligned(self._made_rows)
        kept, made = _kept_and_made(batch)
        self._ids = list(map(id, kept))
        # With one of its tensors a plan ends, without keeping any alive. The function must not know the plan: that
        # would be a circle.
        alive = self._alive = [True]
        self._references = [weakref.ref(tensor, lambda _: alive.clear()) for tensor in kept]
        self._kept_addresses = list(map(Tensor.data_ptr, kept))
        self._made_addresses = list(map(Tensor.data_ptr, made))
        self._kinds = _kinds(made)

    def _unaligned(self, names: list[str]) -> set[int]:
        places: set[int] = set()
        for row in (self.addresses[name] for name in names if name != "STEP"):
            if functools.reduce(operator.or_, row) % ALIGNMENT:
                places.update(i for i, address in enumerate(row) if address % ALIGNMENT)
        return places

    def renewed(self, batch: Batch) -> Plan:
        """This plan, with the addresses of what has moved, if it is that of `batch`; else another one."""
        kept, made = _kept_and_made(batch)
        if (
            not self._alive
            or list(map(id, kept)) != self._ids
            or list(map(Tensor.data_ptr, kept)) != self._kept_addresses
            or _kinds(made) != self._kinds
        ):
            return Plan(batch)
        made_addresses = list(map(Tensor.data_ptr, made))
        if made_addresses != self._made_addresses:
            self.moves += 1
            self._made_addresses, n = made_addresses, len(self.sizes)
            for k, name in enumerate(self._made_rows):
                self.addresses[name] = made_addresses[k * n : (k + 1) * n]
            self.unaligned = self._kept_unaligned | self._unaligned(self._made_rows)
        return self


def _made_rows(batch: Batch) -> tuple[str, ...]:
    """Rows of tensors that are others in each step: gradients that the backward passes have made."""
    return ("G", "PREV") if batch.form is Form.EXACT else ("G",)


def _kept_and_made(batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors that mostly are those of the last step, and others: gradients, and views of flat tensors; by rows."""
    if not batch.is_whole:
        return [], [tensor for row in rows_of(batch).values() for tensor in row]
    kept = [*batch.params, *batch.exp_avgs, *batch.exp_avg_sqs, *batch.steps, *batch.compensations]
    if batch.previous_grads is None:
        return kept, batch.grads
    if batch.form is Form.EXACT:
        return kept, [*batch.grads, *batch.previous_grads]
    return kept + batch.previous_grads, batch.grads


def _kinds(tensors: list[Tensor]) -> tuple:
    """What else than its address the kernels must know of a tensor."""
    is_contiguous = all(map(Tensor.is_contiguous, tensors))
    layouts = is_contiguous or [(t.shape, t.stride()) for t in tensors]
    return set(map(type, tensors)), list(map(_dtype, tensors)), list(map(Tensor.numel, tensors)), layouts


_dtype = operator.attrgetter("dtype")


def _why_not(rows: dict[str, list[Tensor]], batch: Batch) -> str | None:
    params = batch.params
    device = params[0].device
    if any((t.device, t.dtype) != (device, torch.float32) for t in batch.steps):
        return 'a state "step" is not a float32 tensor on the parameter\'s device'
    places = [(param.shape, param.device) for param in params]
    for name, row in rows.items():
        if name == "STEP":
            continue
        if not {type(t) for t in row} <= {Tensor, Parameter} or {t.dtype for t in row} - DTYPES.keys():
            return "not all tensors are plain tensors of floating point numbers"
        if len({t.dtype for t in row}) > 1:
            return "gradients or states have several dtypes"
        if [(t.shape, t.device) for t in row] != places:  # of another model: torch's kernels raise
            return "a gradient or state has another shape or device than its parameter"
    if rows.get("COMPENSATION", params)[0].dtype != params[0].dtype:
        return "the compensation has another dtype than its parameter"
    return None


def _is_flat(tensors: list[Tensor]) -> bool:
    """Whether tensors of one shape lie in memory alike and without gaps: vectors, for elementwise work."""
    if all(t.is_contiguous() for t in tensors):
        return True
    first = tensors[0]
    expected = 1
    for stride, size in sorted(zip(first.stride(), first.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return all(t.shape == first.shape and t.stride() == first.stride() for t in tensors)


# Of the last step's batches, by their first parameter and their number of tensors: a batch and what kernels take of
# it differ in the latter.
_plans: WeakIdKeyDictionary = WeakIdKeyDictionary()


def plan_of(batch: Batch) -> Plan:
    """The plan of a batch, that of the last step where it still holds."""
    if batch.plan is not None:
        return batch.plan
    of_first = _plans.setdefault(batch.params[0] if batch.first is None else batch.first, {})
    known = of_first.get(len(batch.params))
    plan = Plan(batch) if known is None else known.renewed(batch)
    if plan is not known:
        if len(of_first) > 1:  # gradients come and go: no need to keep what belongs to other steps
            of_first.clear()
        of_first[len(batch.params)] = plan
    batch.plan = plan
    return plan


class Table:
    """What the kernels are told of some tensors, on the device: see triton_common.py.

    Attributes:
        places: of each tensor the number of its plan, and its place in that.
        is_aligned: whether all addresses are multiples of 16.
        is_everything: whether these are all tensors of one plan, in order.
        first_blocks: of each tensor, and the number of all blocks.
        table, tensor_of_block, stride: the kernels' arguments.
        zero: a flag that is never raised.
        operands: of launches, which are kept here between steps.
    """

    def __init__(self, sizes: list[int], addresses: Mapping[str, list[int]], is_aligned: bool, device: torch.device):
        self.is_aligned, self.device = is_aligned, device
        self.places: list[tuple[int, int]] = []
        self.is_everything = True
        # A tensor without elements has a block, too, which counts its steps.
        first_blocks = [0, *itertools.accumulate(max(1, -(-size // BLOCK)) for size in sizes)]
        self.blocks, n = first_blocks[-1], len(sizes)
        self.stride = n + 2 - n % 2  # with room for first_blocks, and rows aligned to 16 bytes
        data = array("q")
        for row in (sizes, first_blocks, *(addresses.get(name, ()) for name in ROWS)):
            data.extend(row)
            data.extend([0] * (self.stride - len(row)))
        self.table = _on_host(data, device).to(device, non_blocking=True)
        counts = self.table[self.stride + 1 : self.stride + 1 + n] - self.table[self.stride : self.stride + n]
        self.tensor_of_block = torch.repeat_interleave(counts, output_size=self.blocks).int()
        self.zero = torch.zeros((), dtype=torch.float32, device=device)  # a flag that is not raised
        self.operands: tuple[Any, Any] = None, None
        self.first_blocks = first_blocks
        self._rows: list[dict[str, list[int]]] = []
        self._moves: list[int] = []

    @classmethod
    def of_plans(
        cls, plans: tuple[Plan, ...], places: list[tuple[int, int]], is_aligned: bool, device: torch.device
    ) -> Table:
        """The table of some of the tensors of `plans`."""
        is_everything = len(plans) == 1 and places == [(0, i) for i in range(len(plans[0].sizes))]
        sizes = plans[0].sizes if is_everything else [plans[p].sizes[i] for p, i in places]
        addresses = [plan.addresses for plan in plans]
        chosen = {name: _chosen(name, addresses, places, is_everything) for name in plans[0].addresses}
        table = cls(sizes, chosen, is_aligned, device)
        table.places, table.is_everything = places, is_everything
        table._rows, table._moves = list(map(dict, addresses)), [plan.moves for plan in plans]
        return table

    def follow(self, plans: tuple[Plan, ...]) -> None:
        """Upload the rows of what has moved."""
        moves = [plan.moves for plan in plans]
        if moves == self._moves:
            return
        addresses = [plan.addresses for plan in plans]
        for number, name in enumerate(ROWS, start=2):
            if any(new.get(name) is not old.get(name) for new, old in zip(addresses, self._rows, strict=True)):
                row = array("q", _chosen(name, addresses, self.places, self.is_everything))
                there = self.table.narrow(0, number * self.stride, len(row))
                there.copy_(_on_host(row, self.device), non_blocking=True)
        self._rows, self._moves = list(map(dict, addresses)), moves


def _chosen(
    name: str, addresses: list[dict[str, list[int]]], places: list[tuple[int, int]], is_everything: bool
) -> list[int]:
    """A row of a table."""
    if is_everything:
        return addresses[0][name]
    return [addresses[p][name][i] for p, i in places]


def _on_host(data: array, device: torch.device) -> Tensor:
    """Where a copy to the device can begin without the host waiting for it."""
    tensor = torch.frombuffer(data, dtype=torch.int64)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def tables_of(plans: tuple[Plan, ...], stream: int, device: torch.device) -> list[Table]:
    """The tables of all tensors that the kernels take of `plans`: mostly one.

    They are kept with the first plan, for the stream on which they were made: memory belongs to a stream.
    """
    first, *others = plans
    unaligned = [plan.unaligned for plan in plans]
    if first.tables is not None:
        known_stream, known_others, known_unaligned, tables = first.tables
        if known_stream == stream and _are(known_others, others) and known_unaligned == unaligned:
            for table in tables:
                table.follow(plans)
            return tables
    places = [(p, i) for p, plan in enumerate(plans) for i in plan.taken]
    if first.is_of_matrices:
        places.sort(key=lambda place: plans[place[0]].shapes[place[1]])
    by_alignment: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for p, i in places:
        by_alignment[i not in plans[p].unaligned].append((p, i))
    tables = [Table.of_plans(plans, some, aligned, device) for aligned, some in by_alignment.items() if some]
    first.tables = stream, others, unaligned, tables
    return tables


def _are(left: list, right: list) -> bool:
    return len(left) == len(right) and all(map(operator.is_, left, right))
