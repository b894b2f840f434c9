"""What the Triton kernels are told of tensors, made once and kept for as long as nothing about the tensors changes.

A `Plan` is of one batch, on the host; a `Table` of the plans whose tensors are updated by the same launches, on the
device. In most steps the host only finds that all is as it was: it compares identities and addresses, and uploads
nothing. A plan does not keep states alive.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from array import array
from collections.abc import Iterator, Mapping, Sequence

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


def rows_of(batch: Batch) -> dict[str, list[Tensor]]:
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
    """Which tensors of a batch the kernels take, and their addresses. Not changed once it is made.

    Attributes:
        why_not: why the kernels take none of them; None if they can.
        taken: places in the batch of those that they take.
        left: places of the others, which are strided in ways that no flat memory is.
        dtypes: of each row.
        sizes: elements of each tensor.
        addresses: of each row.
        unaligned: places of those not aligned to 16 bytes, which are moved element by element.
        tables: see `tables_of`.
    """

    def __init__(self, batch: Batch):
        rows = rows_of(batch)
        self.dtypes = {name: row[0].dtype for name, row in rows.items()}
        self.sizes = [param.numel() for param in batch.params]
        self.why_not = _why_not(rows, batch)
        flat = [_is_flat([row[i] for name, row in rows.items() if name != "STEP"]) for i in range(len(self.sizes))]
        self.taken = [i for i, is_flat in enumerate(flat) if is_flat]
        self.left = [i for i, is_flat in enumerate(flat) if not is_flat]
        self.tables: tuple | None = None
        kept, made = _kept_and_made(batch)
        self._ids = list(map(id, kept))
        self._alive = [True]
        # With one of its tensors a plan ends, without keeping any alive. The function must not know the plan: that
        # would be a circle.
        alive = self._alive
        self._references = [weakref.ref(tensor, lambda _: alive.clear()) for tensor in kept]
        self._kept_addresses = list(map(Tensor.data_ptr, kept))
        self._strides = None if all(t.is_contiguous() for t in made) else [t.stride() for t in made]
        self._kinds = _kinds(made)
        self._made_sizes = list(map(Tensor.numel, made))
        self._set_addresses(rows, list(map(Tensor.data_ptr, made)))

    def _set_addresses(self, rows: dict[str, list[Tensor]], made_addresses: list[int]) -> None:
        self._made_addresses = made_addresses
        self.addresses: dict[str, Sequence[int]] = {
            name: array("q", map(Tensor.data_ptr, row)) for name, row in rows.items()
        }
        together = [row for name, row in self.addresses.items() if name != "STEP"]
        self.unaligned = {i for row in together for i, address in enumerate(row) if address % ALIGNMENT}

    def renewed(self, batch: Batch) -> Plan:
        """This plan if it is that of `batch`; else another one."""
        kept, made = _kept_and_made(batch)
        if (
            not self._alive
            or list(map(id, kept)) != self._ids
            or list(map(Tensor.data_ptr, kept)) != self._kept_addresses
            or list(map(Tensor.numel, batch.params)) != self.sizes
            or _kinds(made) != self._kinds
            or list(map(Tensor.numel, made)) != self._made_sizes
            or (self._strides is not None and [t.stride() for t in made] != self._strides)
        ):
            return Plan(batch)
        made_addresses = list(map(Tensor.data_ptr, made))
        if made_addresses == self._made_addresses:
            return self
        moved = object.__new__(Plan)
        moved.__dict__.update(self.__dict__)
        moved.tables = None
        moved._set_addresses(rows_of(batch), made_addresses)
        return moved


def _kept_and_made(batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors that mostly are those of the last step, and those that the backward passes have made."""
    kept = [*batch.params, *batch.exp_avgs, *batch.exp_avg_sqs, *batch.steps, *batch.compensations]
    if batch.previous_grads is None:
        return kept, batch.grads
    if batch.form is Form.EXACT:
        return kept, [*batch.grads, *batch.previous_grads]
    return kept + batch.previous_grads, batch.grads


def _kinds(tensors: list[Tensor]) -> tuple[set, set, bool]:
    return set(map(type, tensors)), {t.dtype for t in tensors}, all(map(Tensor.is_contiguous, tensors))


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


# Of the last step's batches, by their first parameter and their number of parameters: a batch and what the kernels
# take of it differ in the latter.
_plans: WeakIdKeyDictionary = WeakIdKeyDictionary()


def plan_of(batch: Batch) -> Plan:
    """The plan of a batch, that of the last step where it still holds."""
    if batch.plan is not None:
        return batch.plan
    of_first = _plans.setdefault(batch.params[0], {})
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
        table, tensor_of_block, stride: the kernels' arguments.
        zero: a flag that is never raised.
        scratch: the kernels' memory between launches of one step, by name.
    """

    def __init__(
        self, sizes: list[int], addresses: Mapping[str, Sequence[int]], is_aligned: bool, device: torch.device
    ):
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
        on_device = torch.frombuffer(data, dtype=torch.int64)
        if device.type == "cuda":  # the host does not wait for it
            on_device = on_device.pin_memory().to(device, non_blocking=True)
        self.table = on_device
        counts = on_device[self.stride + 1 : self.stride + 1 + n] - on_device[self.stride : self.stride + n]
        self.tensor_of_block = torch.repeat_interleave(counts, output_size=self.blocks).int()
        self.zero = torch.zeros((), dtype=torch.float32, device=device)  # a flag that is not raised
        self._scratch: dict[tuple[str, int, torch.dtype], Tensor] = {}

    @classmethod
    def of_plans(
        cls, plans: tuple[Plan, ...], places: list[tuple[int, int]], is_aligned: bool, device: torch.device
    ) -> Table:
        """The table of some of the tensors of `plans`."""
        is_everything = len(plans) == 1 and len(places) == len(plans[0].sizes)
        if is_everything:
            table = cls(plans[0].sizes, plans[0].addresses, is_aligned, device)
        else:
            names = plans[0].addresses
            addresses = {name: [plans[p].addresses[name][i] for p, i in places] for name in names}
            table = cls([plans[p].sizes[i] for p, i in places], addresses, is_aligned, device)
        table.places, table.is_everything = places, is_everything
        return table

    def scratch(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        """Memory that the next step may use again, of no particular content."""
        key = name, size, dtype
        if key not in self._scratch:
            self._scratch[key] = torch.empty(size, dtype=dtype, device=self.device)
        return self._scratch[key]


def tables_of(plans: tuple[Plan, ...], stream: int, device: torch.device) -> Iterator[Table]:
    """The tables of all tensors that the kernels take of `plans`: mostly one.

    They are kept with the first plan, for the stream on which they were made: memory belongs to a stream.
    """
    first, *others = plans
    if first.tables is None or first.tables[0] != stream or not _are(first.tables[1], others):
        places = [(p, i) for p, plan in enumerate(plans) for i in plan.taken]
        by_alignment: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        for p, i in places:
            by_alignment[i not in plans[p].unaligned].append((p, i))
        tables = [Table.of_plans(plans, some, aligned, device) for aligned, some in by_alignment.items() if some]
        first.tables = stream, others, tables
    yield from first.tables[2]


def _are(left: list, right: list) -> bool:
    return len(left) == len(right) and all(map(operator.is_, left, right))
