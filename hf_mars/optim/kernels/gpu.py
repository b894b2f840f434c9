"""MARS-AdamW's and MARS-Lion's step on GPUs in two passes over memory (`triton_norms.py`, `triton_update.py`).

Correction, clip, moving averages, update and the copy of g_t at once, for all parameters with equal settings. As on
CPUs, the first pass reads g_t alone where ‖g_t‖ and the known ‖g_{t−1}‖ bound ‖c_t‖ well below max_norm; the device
decides that, and the host waits for nothing. Everything is computed in float32 (float64 for float64 parameters),
whatever the dtypes of parameters, gradients and states. Where Triton is missing, steps are composed of torch's
kernels, with the same results to rounding.

With TRITON_INTERPRET=1 in the environment the kernels run in Triton's interpreter, on CPU tensors: for tests.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch
from ..form import Form
from ..host import is_captured
from ..last_grad import LastNorms
from ..precision import needs_wide_copies
from .plan import BLOCK, DTYPES, Plan, Table, plan_of, tables_of

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


def is_interpreted() -> bool:
    """Whether the kernels run on CPU tensors, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_for(device: torch.device) -> bool:
    """Whether this execution is for tensors on `device`."""
    return device.type == ("cpu" if is_interpreted() else "cuda")


@functools.cache
def kernels_for(device: torch.device) -> Kernels | None:
    """The kernels, if Triton is there and they do on `device` what they should; else a warning says why not."""
    with _host_may_wait(device):
        if device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.synchronize(device)  # an error of earlier work shows here, where nobody takes it for Triton's
        try:
            from . import triton_norms, triton_update  # here: importing Triton takes time, and CPUs do not need it

            kernels = Kernels(triton_norms, triton_update)
            _try(kernels, device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no Triton, no C compiler for its launchers, a GPU that it does not support, …
            warnings.warn(
                f"hf_mars's Triton kernels do not run on {device} ({type(error).__name__}: {error}): steps there are "
                "composed of torch's kernels, as right but slower (docs/performance.md)",
                stacklevel=2,
            )
            return None
    return kernels


@contextlib.contextmanager
def _host_may_wait(device: torch.device) -> Iterator[None]:
    """Inside, torch does not report that the host waits for the device (`torch.cuda.set_sync_debug_mode`)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _try(kernels: Kernels, device: torch.device) -> None:
    """Raise an ArithmeticError unless a step of two tensors, of which one is clipped, is that of the formulas."""
    from .trial import trial_batch, what_differs  # with the composition's formulas, which only this needs

    batch, expected = trial_batch(device, BLOCK)
    _step(kernels, [batch], LastNorms())
    differs = what_differs(batch, expected)
    if differs is not None:
        raise ArithmeticError(f"they compute another {differs} than torch's kernels do")


def split(batch: Batch) -> tuple[Batch | None, Batch | None, str | None]:
    """What of a batch `step` takes, what it leaves, and why it leaves that.

    It takes plain tensors on one GPU that lie in memory without gaps, where the choice of kernels is ours. Groups that
    get AdamW as it is are torch's, unless its kernels would need temporary copies.
    """
    why_not = _why_not(batch)
    if why_not is not None:
        return None, batch, why_not
    plan = plan_of(batch)
    if plan.why_not is not None:
        return None, batch, plan.why_not
    if kernels_for(batch.params[0].device) is None:
        return None, batch, "Triton does not work there (a warning says why)"
    if not plan.left:
        return batch, None, None
    why_not = f"of {len(plan.left)} parameters not all tensors lie in memory alike and without gaps"
    return (batch.subset(plan.taken) if plan.taken else None), batch.subset(plan.left), why_not


def _why_not(batch: Batch) -> str | None:
    """Why `step` takes nothing of a batch, as far as its settings and device say."""
    group = batch.group
    if group["update"] not in ("adamw", "lion"):
        return "kernels are for MARS-AdamW and MARS-Lion"
    if group["foreach"] is not None or not group["fused"]:
        return f"foreach={group['foreach']}, fused={group['fused']}"
    if isinstance(group["lr"], Tensor):
        return "lr is a tensor"
    is_plain_adamw = group["update"] == "adamw" and batch.previous_grads is None and group["max_norm"] is None
    if is_plain_adamw and not needs_wide_copies(batch.params[0].dtype, group):
        return "plain AdamW has a fused one there"
    if not batch.is_whole:
        return "parameters are sharded"
    if is_captured(batch.params[0]):  # replayed, a graph would find other values where its table of addresses was
        return "a CUDA graph is captured"
    return None


def step(batches: list[Batch], last_norms: LastNorms) -> None:
    """c_t, c̃_t, m_t (and v_t), the update, and g_t in the place of g_{t−1}, as `execution.Execution` says."""
    kernels = kernels_for(batches[0].params[0].device)
    assert kernels is not None
    _step(kernels, batches, last_norms)


def _step(kernels: Kernels, batches: list[Batch], last_norms: LastNorms) -> None:
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
                _launch(kernels, some_batches, plans[0], table, last_norms, stream)


def _launch_key(batch: Batch, plan: Plan) -> tuple:
    """Equal for batches that the same launches can update."""
    group = batch.group
    settings = (group["update"], batch.form, batch.previous_grads is None, group["gamma"], *group["betas"])
    rates = (group["lr"], group["weight_decay"], group["eps"], group["max_norm"], batch.lr)
    return batch.params[0].device, *settings, *rates, *plan.dtypes.items()


def _launch(
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
