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

from .batch import Batch
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


def is_captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph is made of what is done with ``tensor``, instead of doing it."""
    if torch.compiler.is_compiling() or not tensor.is_cuda:
        return False
    with torch.cuda.device_of(tensor):
        return torch.cuda.is_current_stream_capturing()


@functools.cache
def kernels_for(device: torch.device) -> ModuleType | None:
    """The kernels, if Triton is there and can build and launch them on ``device``; else a warning says why not."""
    try:
        from . import triton_kernels  # here, since importing Triton takes time, and CPUs do not need it

        x, g, g_prev, m, v, t = torch.zeros(6, 4, device=device)
        state = {"exp_avg": m, "exp_avg_sq": v, "step": t[0]}
        group = {"update": "adamw", "lr": 0.0, "betas": (0.9, 0.9), "eps": 1.0, "weight_decay": 0.0}
        group.update(gamma=0.1, max_norm=1.0, kahan_sum=None, exact=False)
        _launch(triton_kernels, Batch(group, [x], [g], [state], [g_prev]), LastNorms())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton, no C compiler for its launchers, a GPU that it does not support, …
        warnings.warn(
            f"hf_mars's Triton kernels do not run on {device} ({type(error).__name__}: {error}): steps there are "
            "composed of torch's kernels, as right but slower (docs/performance.md)",
            stacklevel=2,
        )
        return None
    return triton_kernels


def can_step(batch: Batch) -> bool:
    """Whether :func:`step` can take a group's step: plain, contiguous, aligned tensors on one GPU, parameters of one
    dtype, and the choice of kernels ours.

    Groups that get AdamW as it is are torch's, unless its kernels would need temporary copies.
    """
    params, group = batch.params, batch.group
    if torch.compiler.is_compiling() or group["foreach"] is not None or not group["fused"]:
        return False
    device = params[0].device
    if device.type != ("cpu" if is_interpreted() else "cuda"):
        return False
    if group["update"] not in ("adamw", "lion") or isinstance(group["lr"], Tensor):
        return False
    is_plain_adamw = group["update"] == "adamw" and batch.previous_grads is None and group["max_norm"] is None
    if is_plain_adamw and not needs_wide_copies(params[0].dtype, group):
        return False
    if is_captured(params[0]):
        return False  # replayed, a graph would look for its table of addresses where others' values are by then
    rows = _rows(batch)
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
    if rows.get("COMPENSATION", params)[0].dtype != params[0].dtype:
        return False
    return kernels_for(device) is not None


def step(batch: Batch, last_norms: LastNorms) -> None:
    """c_t, c̃_t, m_t (and v_t), the update, and g_t in the place of g_{t−1}, of all parameters of a batch.

    Modifies the parameters and their states.

    Args:
        batch: as :func:`can_step` wants it. Gradients are not modified.
        last_norms: what is known of ‖g_{t−1}‖₂; brought up to date.
    """
    _launch(kernels_for(batch.params[0].device), batch, last_norms)


def _launch(kernels: ModuleType, batch: Batch, last_norms: LastNorms) -> None:
    params, previous_grads, group = batch.params, batch.previous_grads, batch.group
    keeps_last_grad = batch.keeps_last_grad
    rows = _rows(batch)
    device, n, wide = params[0].device, len(params), torch.promote_types(params[0].dtype, torch.float32)
    is_corrected, clips, is_adamw = previous_grads is not None, group["max_norm"] is not None, "V" in rows
    types = {f"{name}_DTYPE": _triton_dtype(row[0].dtype) for name, row in rows.items()}
    read = {"G_DTYPE": types["G_DTYPE"], "PREV_DTYPE": types.get("PREV_DTYPE", types["G_DTYPE"])}
    flags = {"WIDE": _triton_dtype(wide), "CORRECTED": is_corrected}
    with torch.cuda.device_of(params[0]):
        table, numbers, tensor_of_block, stride = _to_device(rows, group, batch.gamma, device)
        where, blocks = (table, numbers, tensor_of_block, stride), len(tensor_of_block)
        sums_of_g, sums_of_c = [torch.empty(blocks, dtype=wide, device=device) for _ in range(2)]
        norms_of_g, *results = [torch.empty(n, dtype=wide, device=device) for _ in range(4)]
        knowledge = torch.empty(n, dtype=torch.int32, device=device)
        known = _known_norms(last_norms.take(previous_grads)) if keeps_last_grad else None
        if clips and blocks:
            known = torch.full_like(norms_of_g, torch.nan) if known is None else known
            measured = (known, knowledge, sums_of_g, sums_of_c)
            kernels.measure[(blocks,)](*where, *measured, AGAIN=False, BLOCK=BLOCK, num_warps=WARPS, **read, **flags)
            if is_corrected:
                kernels.judge[(n,)](
                    *(table, numbers, stride, known, knowledge, sums_of_g, norms_of_g),
                    WIDE=flags["WIDE"],
                    REDUCED=REDUCED,
                )
                kernels.measure[(blocks,)](
                    *where, *measured, AGAIN=True, BLOCK=BLOCK, num_warps=WARPS, **read, **flags
                )
        if clips or is_adamw:
            kernels.prepare[(n,)](
                *(table, numbers, stride, knowledge, sums_of_g, sums_of_c, *results),
                CLIPS=clips,
                IS_ADAMW=is_adamw,
                REDUCED=REDUCED,
                **flags,
            )
        if blocks:
            kernels.update[(blocks,)](
                *(*where, *results),
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
    changed = [*params, *previous_grads] if keeps_last_grad else params
    torch.autograd.graph.increment_version(changed)  # behind autograd's back
    if keeps_last_grad and clips and blocks:
        last_norms.remember(previous_grads, [(norms_of_g, i) for i in range(n)])


def _rows(batch: Batch) -> dict[str, list[Tensor]]:
    """The kernels' operands by their names in triton_kernels.py, of parameters of one dtype."""
    states = batch.states
    rows = {"X": batch.params, "G": batch.grads, "M": [state["exp_avg"] for state in states]}
    if batch.previous_grads is not None:
        rows["PREV"] = batch.previous_grads
    if batch.group["update"] == "adamw":
        rows["V"] = [state["exp_avg_sq"] for state in states]
        rows["STEP"] = [state["step"] for state in states]
    if needs_compensation(batch.params[0].dtype, batch.group):
        rows["COMPENSATION"] = [state["compensation"] for state in states]
    return rows


def _known_norms(norms: list[tuple[Tensor, int] | None]) -> Tensor | None:
    """The tensor that holds all of them in this order, as the last step left them.

    None if there is none, as where other parameters have a gradient than in the last step.
    """
    if any(norm is None for norm in norms) or any(i != place for i, (_, place) in enumerate(norms)):
        return None
    vector = norms[0][0]
    return vector if len(vector) == len(norms) and all(other is vector for other, _ in norms) else None


def _to_device(
    rows: dict[str, list[Tensor]], group: dict[str, Any], gamma: float, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, int]:
    """What triton_kernels.py calls table, numbers, tensor_of_block and stride. The host does not wait for it."""
    names = ("X", "G", "PREV", "M", "V", "STEP", "COMPENSATION")
    beta1, beta2 = group["betas"]
    lr, n = group["lr"], len(rows["X"])
    sizes = [param.numel() for param in rows["X"]]
    first_blocks = [0, *itertools.accumulate(-(-size // BLOCK) for size in sizes)]
    stride = n + 2 - n % 2  # even, so that every row is aligned to 16 bytes, and with room for first_blocks
    numbers = (scaling(group["gamma"], beta1), beta1, beta2, group["eps"], gamma, lr, 1 - lr * group["weight_decay"])
    numbers = array("d", [*numbers, group["max_norm"] or 0.0])
    data = array("q", numbers.tobytes())
    for row in (sizes, first_blocks, *([t.data_ptr() for t in rows.get(name, ())] for name in names)):
        data.extend(row)
        data.extend([0] * (stride - len(row)))
    data = torch.frombuffer(data, dtype=torch.int64)
    if device.type == "cuda":
        data = data.pin_memory().to(device, non_blocking=True)
    table = data[len(numbers) :]
    counts = table[stride + 1 : stride + 1 + n] - table[stride : stride + n]
    tensor_of_block = torch.repeat_interleave(counts, output_size=first_blocks[-1])
    return table, data[: len(numbers)].view(torch.float64), tensor_of_block, stride


def _triton_dtype(dtype: torch.dtype):
    import triton.language as tl

    return getattr(tl, _TRITON_NAMES[dtype])
