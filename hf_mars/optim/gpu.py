"""MARS-AdamW's and MARS-Lion's step on GPUs in two passes over memory (``triton_kernels.py``).

Correction, clip, moving averages, update and the copy of g_t at once, for all parameters of a group. As on CPUs, the
first pass reads g_t alone where ‖g_t‖ and the known ‖g_{t−1}‖ bound ‖c_t‖ well below max_norm; the device decides
that, and the host waits for nothing. Everything is computed in float32 (float64 for float64 parameters), whatever the
dtypes of parameters, gradients and states. Where Triton is missing, steps are composed of torch's kernels, with the
same results to rounding.

With TRITON_INTERPRET=1 in the environment the kernels run in Triton's interpreter, on CPU tensors: for tests.
"""

from __future__ import annotations

import functools
import itertools
import os
import warnings
from array import array
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .correction import scaling
from .last_grad import LastNorms
from .precision import needs_compensation, needs_wide_copies

BLOCK, WARPS = 2048, 8  # of a program, which has two 16-byte loads of each float32 operand under way a thread
REDUCED = 1024  # partial sums that are added up at a time

_TRITON_NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def is_interpreted() -> bool:
    """Whether the kernels run on CPU tensors, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def kernels_for(device: torch.device) -> ModuleType | None:
    """The kernels, if Triton is there and can build and launch them on ``device``; else a warning says why not."""
    try:
        from . import triton_kernels  # here, since importing Triton takes time, and CPUs do not need it

        numbers, blocks = (torch.zeros(8, dtype=dtype, device=device) for dtype in (torch.float64, torch.int64))
        knowledge, *floats = torch.zeros(1, dtype=torch.int32, device=device), *torch.zeros(3, 1, device=device)
        with torch.cuda.device_of(numbers):  # the smallest of them, for one tensor without elements
            triton_kernels.judge[(1,)](
                *(numbers, blocks, floats[0], knowledge, floats[1], floats[2]),
                WIDE=_triton_dtype(torch.float32),
                REDUCED=REDUCED,
            )
    except Exception as error:  # no Triton, no C compiler for its launchers, a GPU that it does not support, …
        warnings.warn(
            f"hf_mars's Triton kernels do not run on {device} ({type(error).__name__}: {error}): steps there are "
            "composed of torch's kernels, as right but slower (docs/performance.md)",
            stacklevel=2,
        )
        return None
    return triton_kernels


def can_step(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    previous_grads: list[Tensor] | None,
    group: dict[str, Any],
) -> bool:
    """Whether :func:`step` can take a group's step: plain, contiguous, aligned tensors on GPUs, and the choice of
    kernels ours.

    Groups that get AdamW as it is are torch's, unless its kernels would need temporary copies.
    """
    if torch.compiler.is_compiling() or group["foreach"] is not None or not group["fused"]:
        return False
    device = params[0].device
    if device.type != ("cpu" if is_interpreted() else "cuda"):
        return False
    if group["update"] not in ("adamw", "lion") or isinstance(group["lr"], Tensor):
        return False
    is_plain_adamw = group["update"] == "adamw" and previous_grads is None and group["max_norm"] is None
    if is_plain_adamw and not any(needs_wide_copies(param.dtype, group) for param in params):
        return False
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False  # replayed, a graph would look for its table of addresses where others' values are by then
    rows = _rows(params, grads, states, previous_grads, group)
    steps = rows.pop("STEP", [])
    if any((t.device, t.dtype) != (device, torch.float32) for t in steps):
        return False
    places = [(param.shape, param.device) for param in params]
    for row in rows.values():
        if not {type(t) for t in row} <= {Tensor, Parameter} or {t.dtype for t in row} - _TRITON_NAMES.keys():
            return False
        if len({t.dtype for t in row}) > 1 or not all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in row):
            return False
        if [(t.shape, t.device) for t in row] != places:  # loaded from another model: torch's kernels will say so
            return False
    return kernels_for(device) is not None


def step(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    previous_grads: list[Tensor] | None,
    group: dict[str, Any],
    last_norms: LastNorms,
    *,
    gamma: float,
    keeps_last_grad: bool,
) -> None:
    """c_t, c̃_t, m_t (and v_t), the update, and g_t in the place of g_{t−1}, of all parameters.

    Modifies the parameters and their states.

    Args:
        params, grads, previous_grads: as :func:`can_step` wants them. Gradients are not modified.
        states: as :func:`~hf_mars.optim.adamw.adamw` and :func:`~hf_mars.optim.lion.lion` expect them.
        group: the group's settings.
        last_norms: what is known of ‖g_{t−1}‖₂; brought up to date.
        gamma: as :func:`~hf_mars.optim.correction.momentum` expects it.
        keeps_last_grad: whether ``previous_grads`` are g_{t−1}, which g_t replaces, non-finite entries as zeros.
    """
    rows = _rows(params, grads, states, previous_grads, group)
    device, n, wide = params[0].device, len(params), torch.promote_types(params[0].dtype, torch.float32)
    is_corrected, clips, is_adamw = previous_grads is not None, group["max_norm"] is not None, "V" in rows
    table, numbers = _to_device(rows, group, gamma, device)
    sizes, first_blocks, tensor_of_block = _blocks(tuple([param.numel() for param in params]), device)
    blocks = len(tensor_of_block)
    sums_of_g, sums_of_c = torch.empty(2, blocks, dtype=wide, device=device)
    norms_of_g, scales, step_sizes, inverse_root_bias2 = torch.empty(4, n, dtype=wide, device=device)
    knowledge = torch.empty(n, dtype=torch.int32, device=device)
    types = {f"{name}_DTYPE": _triton_dtype(row[0].dtype) for name, row in rows.items()}
    read = {"G_DTYPE": types["G_DTYPE"], "PREV_DTYPE": types.setdefault("PREV_DTYPE", types["G_DTYPE"])}
    flags = {"WIDE": _triton_dtype(wide), "CORRECTED": is_corrected}
    kernels = kernels_for(device)
    with torch.cuda.device_of(params[0]):
        if clips and blocks:
            known = _known_norms(last_norms.of(params, previous_grads)) if keeps_last_grad else None
            if known is None:
                known = torch.full_like(norms_of_g, torch.nan)
            measured = (
                table,
                numbers,
                sizes,
                first_blocks,
                tensor_of_block,
                n,
                known,
                knowledge,
                sums_of_g,
                sums_of_c,
            )
            kernels.measure[(blocks,)](*measured, AGAIN=False, BLOCK=BLOCK, num_warps=WARPS, **read, **flags)
            if is_corrected:
                kernels.judge[(n,)](
                    numbers, first_blocks, known, knowledge, sums_of_g, norms_of_g, WIDE=flags["WIDE"], REDUCED=REDUCED
                )
                kernels.measure[(blocks,)](*measured, AGAIN=True, BLOCK=BLOCK, num_warps=WARPS, **read, **flags)
        if clips or is_adamw:
            kernels.prepare[(n,)](
                *(table, numbers, first_blocks, n, knowledge, sums_of_g, sums_of_c),
                *(scales, step_sizes, inverse_root_bias2),
                CLIPS=clips,
                IS_ADAMW=is_adamw,
                REDUCED=REDUCED,
                **flags,
            )
        if blocks:
            kernels.update[(blocks,)](
                *(table, numbers, sizes, first_blocks, tensor_of_block, n, scales, step_sizes, inverse_root_bias2),
                X_DTYPE=types["X_DTYPE"],
                M_DTYPE=types["M_DTYPE"],
                V_DTYPE=types.get("V_DTYPE", types["M_DTYPE"]),
                REMEMBERS=keeps_last_grad,
                CLIPS=clips,
                IS_ADAMW=is_adamw,
                COMPENSATED="COMPENSATION" in rows,
                BLOCK=BLOCK,
                num_warps=WARPS,
                **read,
                **flags,
            )
    torch.autograd.graph.increment_version(params)  # they were changed behind autograd's back
    if keeps_last_grad:
        # Where there was no clip, or nothing to measure, norms_of_g was not written.
        norms = [(norms_of_g, i) if clips and blocks else None for i in range(n)]
        last_norms.remember(params, previous_grads, norms)


def _rows(params, grads, states, previous_grads, group) -> dict[str, list[Tensor]]:
    """The kernels' operands by their names in triton_kernels.py, of parameters of one dtype."""
    rows = {"X": params, "G": grads, "M": [state["exp_avg"] for state in states]}
    if previous_grads is not None:
        rows["PREV"] = previous_grads
    if group["update"] == "adamw":
        rows["V"] = [state["exp_avg_sq"] for state in states]
        rows["STEP"] = [state["step"] for state in states]
    if needs_compensation(params[0].dtype, group):
        rows["COMPENSATION"] = [state["compensation"] for state in states]
    return rows


def _known_norms(norms: list[tuple[Tensor, int] | None]) -> Tensor | None:
    """The tensor that holds all of them in this order, as the last step left them; None if there is none."""
    if None in norms or any(i != place for i, (_, place) in enumerate(norms)):
        return None
    vectors = {id(vector): vector for vector, _ in norms}
    vector = next(iter(vectors.values()))
    return vector if len(vectors) == 1 and len(vector) == len(norms) else None


def _to_device(rows: dict[str, list[Tensor]], group: dict[str, Any], gamma: float, device) -> tuple[Tensor, Tensor]:
    """The table of addresses and the hyperparameters, in one transfer that the host does not wait for."""
    names = ("X", "G", "PREV", "M", "V", "STEP", "COMPENSATION")
    beta1, beta2 = group["betas"]
    lr, n = group["lr"], len(rows["X"])
    table = array("q")
    for name in names:
        table.extend([t.data_ptr() for t in rows[name]] if name in rows else [0] * n)
    numbers = (scaling(group["gamma"], beta1), beta1, beta2, group["eps"], gamma, lr, 1 - lr * group["weight_decay"])
    table.frombytes(array("d", [*numbers, group["max_norm"] or 0.0]).tobytes())
    on_host = torch.frombuffer(table, dtype=torch.int64)
    on_device = on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host
    return on_device, on_device[len(names) * n :].view(torch.float64)


@functools.lru_cache(maxsize=64)  # a model's groups
def _blocks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """How tensors of such ``sizes`` are cut into blocks: what triton_kernels.py calls sizes, first_blocks (int64) and
    tensor_of_block (int32)."""
    counts = [-(-size // BLOCK) for size in sizes]
    tensor_of_block = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    tables = (torch.tensor(sizes), torch.tensor([0, *itertools.accumulate(counts)]), tensor_of_block)
    if device.type == "cuda":
        return tuple(table.pin_memory().to(device, non_blocking=True) for table in tables)
    return tables


def _triton_dtype(dtype: torch.dtype):
    import triton.language as tl

    return getattr(tl, _TRITON_NAMES[dtype])
