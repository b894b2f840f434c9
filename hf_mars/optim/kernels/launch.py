"""Launches of the Triton kernels: of a step, and of the composition's clip."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch
from ..form import Form
from ..last_grad import LastNorms
from .plan import ALIGNMENT, BLOCK, DTYPES, Plan, Table, plan_of, tables_of

# Of a launch. Products are not fused with sums, so that they are rounded as torch's kernels round them; the kernels
# wait for memory, and lose no time by it.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
REDUCED = 1024  # partial sums that are added up at a time
PROGRAMS_PER_UNIT = 4  # multiprocessor, of the pass that mostly finds nothing to do


@dataclass(frozen=True)
class Kernels:
    """The modules of the kernels."""

    norms: ModuleType
    update: ModuleType


def launches_of(kernels: Kernels, batches: list[Batch], last_norms: LastNorms) -> list[Launch]:
    """Those that update `batches`: those of equal settings together. Takes the known ‖g_{t−1}‖ of them."""
    together: dict[tuple, list[tuple[Batch, Plan]]] = {}
    for batch in batches:
        plan = plan_of(batch)
        together.setdefault(_key(batch, plan), []).append((batch, plan))
    launches = []
    for some in together.values():
        some_batches, plans = [batch for batch, _ in some], tuple(plan for _, plan in some)
        device = some_batches[0].params[0].device
        with torch.cuda.device_of(some_batches[0].params[0]):
            stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0
            for table in tables_of(plans, stream, device):
                launches.append(Launch(kernels, some_batches, plans[0], table, last_norms, stream))
    return launches


def _key(batch: Batch, plan: Plan) -> tuple:
    """Equal for batches that the same launches can update."""
    group = batch.group
    settings = (group["update"], batch.form, batch.previous_grads is None, group["gamma"], *group["betas"])
    rates = (group["lr"], group["weight_decay"], group["eps"], group["max_norm"], batch.lr, group["skip_nonfinite"])
    return batch.params[0].device, *settings, *rates, *plan.dtypes.items()


class Launch:
    """The kernels' operands for batches with equal settings, and the launches of one step."""

    def __init__(
        self,
        kernels: Kernels,
        batches: list[Batch],
        plan: Plan,
        table: Table,
        last_norms: LastNorms,
        stream: int,
    ):
        batch, group = batches[0], batches[0].group
        beta1, beta2 = group["betas"]
        lr, max_norm = batch.lr, group["max_norm"]
        numbers = (batch.kappa, beta1, beta2, group["eps"], batch.momentum_gamma, lr, 1 - lr * batch.weight_decay)
        self._kernels, self._batches, self._table, self._stream = kernels, batches, table, stream
        self.group, self.device = group, table.device
        *self._numbers, self._max_norm = _bits((*numbers, max_norm or 0.0))
        self._is_corrected, self._clips = batch.previous_grads is not None, max_norm is not None
        self._is_adamw, self._is_compensated = "V" in plan.dtypes, "COMPENSATION" in plan.dtypes
        self._keeps_last_grad = batch.form is Form.APPROX
        self._types = {f"{name}_DTYPE": _triton_dtype(dtype) for name, dtype in plan.dtypes.items()}
        g_dtype = self._types["G_DTYPE"]
        wide = torch.promote_types(plan.dtypes["X"], torch.float32)
        self._wide = {"WIDE": _triton_dtype(wide)}
        self._read = {"G_DTYPE": g_dtype, "PREV_DTYPE": self._types.get("PREV_DTYPE", g_dtype)}
        # f of the global clip: one for all batches of a step.
        factor = table.zero if batch.factor is None else batch.factor
        self._factor = factor if isinstance(factor, Tensor) else torch.tensor(factor, dtype=torch.float64)
        self._scaling = {"SCALES": batch.factor is not None}
        self._lanes: dict[str, Any] = {"ALIGNED": table.is_aligned, "BLOCK": BLOCK, **OPTIONS}
        n = len(table.places)
        self._knowledge = table.scratch("knowledge", n, torch.int32)
        blocks = table.blocks if self._clips else 1
        self._sums = [table.scratch(name, blocks, torch.float64) for name in ("sums_of_g", "sums_of_c")]
        self._results = [table.scratch(name, n, wide) for name in ("factors", "step_sizes", "inverse_root_bias2")]
        self._norms_of_g = table.scratch("norms_of_g", n, wide)  # of no use without the clip
        self._known: Tensor | None = None
        self._last_grads: list[Tensor] = []
        if self._keeps_last_grad and self._is_corrected:
            self._last_grads = self._tensors("previous_grads")
            if self._clips and table.blocks:
                self._known = last_norms.take_vector(self._last_grads, stream)
                self._norms_of_g = torch.empty(n, dtype=wide, device=table.device)

    def measure(self, flag: Tensor | None) -> None:
        """Norms and what follows of them for each tensor; raises `flag`, if there is one, where c_t is not finite."""
        norms, table, n = self._kernels.norms, self._table, len(self._table.places)
        of_block = (table.table, table.tensor_of_block, table.stride)
        of_tensor = (table.table, table.stride)
        kappa, beta1, beta2, _, _, lr, _ = self._numbers
        with torch.cuda.device_of(table.table):
            if self._clips and table.blocks:
                prev_norms = self._known
                if prev_norms is None:
                    prev_norms = torch.full_like(self._norms_of_g, torch.nan)
                norms.measure[(table.blocks,)](
                    *(*of_block, kappa, self._max_norm, prev_norms, *self._sums, self._factor),
                    CORRECTED=self._is_corrected,
                    **self._scaling,
                    **self._wide,
                    **self._read,
                    **self._lanes,
                )
                if self._is_corrected:
                    norms.judge[(n,)](
                        *(*of_tensor, kappa, self._max_norm, prev_norms, self._knowledge, self._sums[0]),
                        self._norms_of_g,
                        REDUCED=REDUCED,
                        **self._wide,
                    )
                if self._known is not None:  # else all have been measured
                    norms.measure_rest[(min(table.blocks, PROGRAMS_PER_UNIT * _units(table.device)),)](
                        *(*of_tensor, n, kappa, self._knowledge, self._sums[1], self._factor),
                        **self._scaling,
                        REDUCED=REDUCED,
                        **self._wide,
                        **self._read,
                        **self._lanes,
                    )
            if self._clips or self._is_adamw:
                norms.prepare[(n,)](
                    *(*of_tensor, beta1, beta2, lr, self._max_norm, self._knowledge, *self._sums, *self._results),
                    table.zero if flag is None else flag,
                    CORRECTED=self._is_corrected,
                    CLIPS=self._clips,
                    RAISES=flag is not None,
                    IS_ADAMW=self._is_adamw,
                    REDUCED=REDUCED,
                    **self._wide,
                )

    def update(self, flag: Tensor | None) -> None:
        """The update of all tensors, unless `flag` is raised."""
        table = self._table
        if table.blocks:
            with torch.cuda.device_of(table.table):
                self._kernels.update.update[(table.blocks,)](
                    *(table.table, table.tensor_of_block, table.stride, *self._numbers, *self._results),
                    table.zero if flag is None else flag,
                    self._norms_of_g,
                    self._factor,
                    X_DTYPE=self._types["X_DTYPE"],
                    M_DTYPE=self._types["M_DTYPE"],
                    V_DTYPE=self._types.get("V_DTYPE", self._types["M_DTYPE"]),
                    CORRECTED=self._is_corrected,
                    KEEPS_LAST_GRAD=self._keeps_last_grad,
                    CLIPS=self._clips,
                    IS_ADAMW=self._is_adamw,
                    COMPENSATED=self._is_compensated,
                    **self._scaling,
                    **self._wide,
                    **self._read,
                    **self._lanes,
                )
        # They were changed behind autograd's back.
        torch.autograd.graph.increment_version([*self._tensors("params"), *self._last_grads])

    def remember(self, last_norms: LastNorms) -> None:
        """‖g_t‖₂, which will be those of g_{t−1}."""
        if self._last_grads and self._clips and self._table.blocks:
            last_norms.remember_vector(self._last_grads, self._norms_of_g, self._stream)

    def _tensors(self, name: str) -> list[Tensor]:
        if self._table.is_everything:
            return getattr(self._batches[0], name)
        rows = [getattr(batch, name) for batch in self._batches]
        return [rows[p][i] for p, i in self._table.places]


def divide(kernels: Kernels, tensors: list[Tensor], divisors: Tensor) -> None:
    """See gpu.py."""
    device = tensors[0].device
    addresses = [t.data_ptr() for t in tensors]
    is_aligned = not any(address % ALIGNMENT for address in addresses)
    with torch.cuda.device_of(tensors[0]):
        table = Table([t.numel() for t in tensors], {"X": addresses}, is_aligned, device)
        if table.blocks:
            kernels.norms.divide[(table.blocks,)](
                *(table.table, table.tensor_of_block, table.stride, divisors),
                DTYPE=_triton_dtype(tensors[0].dtype),
                WIDE=_triton_dtype(torch.promote_types(tensors[0].dtype, torch.float32)),
                ALIGNED=is_aligned,
                BLOCK=BLOCK,
                **OPTIONS,
            )
    torch.autograd.graph.increment_version(tensors)


def _bits(values: Iterable[float]) -> list[int]:
    """Floats as integers that kernels make float64 of: float arguments of a kernel would be float32.

    Of the negatives: hyperparameters are not negative, and so no value is an int32 here and an int64 there.
    """
    return array("q", array("d", [-value for value in values]).tobytes()).tolist()


@functools.cache
def _units(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, DTYPES[dtype])
