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


def take(kernels: Kernels, batches: list[Batch], last_norms: LastNorms) -> None:
    """One step of batches on one device; see `execution.Execution`."""
    launched_together: dict[tuple, list[tuple[Batch, Plan]]] = {}
    for batch in batches:
        plan = plan_of(batch)
        launched_together.setdefault(_launch_key(batch, plan), []).append((batch, plan))
    for some in launched_together.values():
        some_batches, plans = [batch for batch, _ in some], tuple(plan for _, plan in some)
        device = some_batches[0].params[0].device
        with torch.cuda.device_of(some_batches[0].params[0]):
            stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0
            for table in tables_of(plans, stream, device):
                launch(kernels, some_batches, plans[0], table, last_norms, stream)


def _launch_key(batch: Batch, plan: Plan) -> tuple:
    """Equal for batches that the same launches can update."""
    group = batch.group
    settings = (group["update"], batch.form, batch.previous_grads is None, group["gamma"], *group["betas"])
    rates = (group["lr"], group["weight_decay"], group["eps"], group["max_norm"], batch.lr)
    return batch.params[0].device, *settings, *rates, *plan.dtypes.items()


def launch(
    kernels: Kernels, batches: list[Batch], plan: Plan, table: Table, last_norms: LastNorms, stream: int
) -> None:
    batch, group = batches[0], batches[0].group
    beta1, beta2 = group["betas"]
    lr, max_norm = batch.lr, group["max_norm"]
    kappa, beta1, beta2, eps, gamma, rate, decay, largest = _bits(
        (
            batch.kappa,
            beta1,
            beta2,
            group["eps"],
            batch.momentum_gamma,
            lr,
            1 - lr * batch.weight_decay,
            max_norm or 0.0,
        )
    )
    is_corrected, clips, is_adamw = batch.previous_grads is not None, max_norm is not None, "V" in plan.dtypes
    keeps_last_grad = batch.form is Form.APPROX
    n, blocks = len(table.places), table.blocks
    wide = torch.promote_types(plan.dtypes["X"], torch.float32)
    types = {f"{name}_DTYPE": _triton_dtype(dtype) for name, dtype in plan.dtypes.items()}
    read = {"G_DTYPE": types["G_DTYPE"], "PREV_DTYPE": types.get("PREV_DTYPE", types["G_DTYPE"])}
    shared: dict[str, Any] = {"WIDE": _triton_dtype(wide)}
    lanes: dict[str, Any] = {"ALIGNED": table.is_aligned, "BLOCK": BLOCK, **OPTIONS}
    of_block = (table.table, table.tensor_of_block, table.stride)
    of_tensor = (table.table, table.stride)
    clip_factors, step_sizes, inverse_root_bias2 = (
        table.scratch(name, n, wide) for name in ("clip_factors", "step_sizes", "inverse_root_bias2")
    )
    knowledge = table.scratch("knowledge", n, torch.int32)
    sums_of_g, sums_of_c = (table.scratch(name, blocks if clips else 1, wide) for name in ("sums_of_g", "sums_of_c"))
    last_grads = _tensors(batches, table, "previous_grads") if keeps_last_grad and clips and is_corrected else None
    norms_of_g: Tensor | None = None

    if clips and blocks:
        known = None if last_grads is None else last_norms.take_vector(last_grads, stream)
        norms_of_g = torch.empty(n, dtype=wide, device=table.device)
        prev_norms = torch.full_like(norms_of_g, torch.nan) if known is None else known
        kernels.norms.measure[(blocks,)](
            *(*of_block, kappa, largest, prev_norms, sums_of_g, sums_of_c),
            **shared,
            CORRECTED=is_corrected,
            **read,
            **lanes,
        )
        if is_corrected:
            kernels.norms.judge[(n,)](
                *(*of_tensor, kappa, largest, prev_norms, knowledge, sums_of_g, norms_of_g), **shared, REDUCED=REDUCED
            )
        if known is not None:  # else all have been measured
            kernels.norms.measure_rest[(min(blocks, PROGRAMS_PER_UNIT * _units(table.device)),)](
                *(*of_tensor, n, kappa, knowledge, sums_of_c), **shared, REDUCED=REDUCED, **read, **lanes
            )
    if clips or is_adamw:
        kernels.norms.prepare[(n,)](
            *(*of_tensor, beta1, beta2, rate, largest, knowledge, sums_of_g, sums_of_c),
            *(clip_factors, step_sizes, inverse_root_bias2),
            **shared,
            CORRECTED=is_corrected,
            CLIPS=clips,
            IS_ADAMW=is_adamw,
            REDUCED=REDUCED,
        )
    if blocks:
        kernels.update.update[(blocks,)](
            *(*of_block, kappa, beta1, beta2, eps, gamma, rate, decay),
            *(clip_factors, step_sizes, inverse_root_bias2),
            **shared,
            X_DTYPE=types["X_DTYPE"],
            M_DTYPE=types["M_DTYPE"],
            V_DTYPE=types.get("V_DTYPE", types["M_DTYPE"]),
            CORRECTED=is_corrected,
            KEEPS_LAST_GRAD=keeps_last_grad,
            CLIPS=clips,
            IS_ADAMW=is_adamw,
            COMPENSATED="COMPENSATION" in plan.dtypes,
            **read,
            **lanes,
        )
    torch.autograd.graph.increment_version(_tensors(batches, table, "params"))  # changed behind autograd's back
    if keeps_last_grad and is_corrected:
        torch.autograd.graph.increment_version(_tensors(batches, table, "previous_grads"))
    if last_grads is not None and norms_of_g is not None:
        last_norms.remember_vector(last_grads, norms_of_g, stream)


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


def _tensors(batches: list[Batch], table: Table, name: str) -> list[Tensor]:
    if table.is_everything:
        return getattr(batches[0], name)
    rows = [getattr(batch, name) for batch in batches]
    return [rows[p][i] for p, i in table.places]


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
