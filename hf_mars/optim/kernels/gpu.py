"""MARS-AdamW's and MARS-Lion's step on GPUs in two passes over memory (`triton_kernels.py`).

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

from ..batch import Batch
from ..form import Form
from ..host import is_captured
from ..last_grad import LastNorms
from ..precision import needs_wide_copies
from ..sharding import WHOLE

BLOCK, WARPS = 2048, 8  # of a program; each of its threads has two 16-byte loads of each float32 operand under way
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


def is_for(device: torch.device) -> bool:
    """Whether this execution is for tensors on `device`."""
    return device.type == ("cpu" if is_interpreted() else "cuda")


@functools.cache
def kernels_for(device: torch.device) -> ModuleType | None:
    """The kernels, if Triton is there and can build and launch them on `device`; else a warning says why not."""
    try:
        from . import triton_kernels  # here, since importing Triton takes time, and CPUs do not need it

        x, g, g_prev, m, v, t = torch.zeros(6, 4, dtype=torch.float32, device=device)
        group = {"update": "adamw", "lr": 0.0, "betas": (0.9, 0.9), "eps": 1.0, "weight_decay": 0.0}
        group.update(gamma=0.1, max_norm=1.0, adjust_lr_fn="original")
        _launch(
            triton_kernels,
            Batch(group, Form.APPROX, [x], [g], [g_prev], [m], [v], [t[0]], [], [{}], [WHOLE]),
            LastNorms(),
        )
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


def why_not(batch: Batch) -> str | None:
    """Why `step` cannot take a batch; None if it can.

    It takes plain, contiguous, aligned tensors on one GPU, where the choice of kernels is ours. Groups that get AdamW
    as it is are torch's, unless its kernels would need temporary copies.
    """
    params, group = batch.params, batch.group
    if group["update"] not in ("adamw", "lion"):
        return "kernels are for MARS-AdamW and MARS-Lion"
    if group["foreach"] is not None or not group["fused"]:
        return f"foreach={group['foreach']}, fused={group['fused']}"
    if isinstance(group["lr"], Tensor):
        return "lr is a tensor"
    is_plain_adamw = group["update"] == "adamw" and batch.previous_grads is None and group["max_norm"] is None
    if is_plain_adamw and not needs_wide_copies(params[0].dtype, group):
        return "plain AdamW has a fused one there"
    if not batch.is_whole:
        return "parameters are sharded"
    if is_captured(params[0]):  # replayed, a graph would find other values where its table of addresses was
        return "a CUDA graph is captured"
    device = params[0].device
    rows = _rows(batch)
    steps = rows.pop("STEP", [])
    if any((t.device, t.dtype) != (device, torch.float32) for t in steps):
        return 'a state "step" is not a float32 tensor on the parameter\'s device'
    places = [(param.shape, param.device) for param in params]
    for row in rows.values():
        if not {type(t) for t in row} <= {Tensor, Parameter} or {t.dtype for t in row} - _TRITON_NAMES.keys():
            return "not all tensors are plain tensors of floating point numbers"
        if len({t.dtype for t in row}) > 1:
            return "gradients or states have several dtypes"
        if not all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in row):
            return "not all tensors are contiguous and aligned to 16 bytes"
        if [(t.shape, t.device) for t in row] != places:  # of another model: torch's kernels raise
            return "a gradient or state has another shape or device than its parameter"
    if rows.get("COMPENSATION", params)[0].dtype != params[0].dtype:
        return "the compensation has another dtype than its parameter"
    return None if kernels_for(device) is not None else "Triton does not work there (a warning says why)"


def step(batches: list[Batch], last_norms: LastNorms) -> None:
    """c_t, c̃_t, m_t (and v_t), the update, and g_t in the place of g_{t−1}, as `execution.Execution` says."""
    for batch in batches:
        kernels = kernels_for(batch.params[0].device)
        assert kernels is not None
        _launch(kernels, batch, last_norms)


def _launch(kernels: ModuleType, batch: Batch, last_norms: LastNorms) -> None:
    params, previous_grads, group = batch.params, batch.previous_grads, batch.group
    keeps_last_grad = batch.form is Form.APPROX
    rows = _rows(batch)
    device, n, wide = params[0].device, len(params), torch.promote_types(params[0].dtype, torch.float32)
    is_corrected, clips, is_adamw = previous_grads is not None, group["max_norm"] is not None, "V" in rows
    types = {f"{name}_DTYPE": _triton_dtype(row[0].dtype) for name, row in rows.items()}
    read = {"G_DTYPE": types["G_DTYPE"], "PREV_DTYPE": types.get("PREV_DTYPE", types["G_DTYPE"])}
    flags = {"WIDE": _triton_dtype(wide), "CORRECTED": is_corrected}
    with torch.cuda.device_of(params[0]):
        table, numbers, tensor_of_block, stride = _to_device(rows, batch, device)
        where, blocks = (table, numbers, tensor_of_block, stride), len(tensor_of_block)
        sums_of_g, sums_of_c = [torch.empty(blocks, dtype=wide, device=device) for _ in range(2)]
        norms_of_g, *results = [torch.empty(n, dtype=wide, device=device) for _ in range(4)]
        knowledge = torch.empty(n, dtype=torch.int32, device=device)
        known = _known_norms(last_norms.take(previous_grads)) if keeps_last_grad and previous_grads else None
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
                KEEPS_LAST_GRAD=keeps_last_grad,
                CLIPS=clips,
                IS_ADAMW=is_adamw,
                COMPENSATED="COMPENSATION" in rows,
                BLOCK=BLOCK,
                num_warps=WARPS,
                **read,
                **flags,
            )
    torch.autograd.graph.increment_version(params)  # they were changed behind autograd's back
    if keeps_last_grad and previous_grads:
        torch.autograd.graph.increment_version(previous_grads)
    if keeps_last_grad and previous_grads and clips and blocks:
        last_norms.remember(previous_grads, [(norms_of_g, i) for i in range(n)])


def _rows(batch: Batch) -> dict[str, list[Tensor]]:
    """The kernels' operands by their names in triton_kernels.py, of parameters of one dtype."""
    rows = {
        "X": batch.params,
        "G": batch.grads,
        "M": batch.exp_avgs,
        "PREV": batch.previous_grads or [],
        "V": batch.exp_avg_sqs,
        "STEP": batch.steps,
        "COMPENSATION": batch.compensations,
    }
    return {name: row for name, row in rows.items() if row}


def _known_norms(norms: list[tuple[Tensor, int] | None]) -> Tensor | None:
    """The tensor that holds all of them in this order, as the last step left them.

    None if there is none, as where other parameters have a gradient than in the last step.
    """
    if norms[0] is None:
        return None
    vector, _ = norms[0]
    is_whole_vector = len(vector) == len(norms) and all(
        norm is not None and norm[0] is vector and norm[1] == place for place, norm in enumerate(norms)
    )
    return vector if is_whole_vector else None


def _to_device(
    rows: dict[str, list[Tensor]], batch: Batch, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, int]:
    """table, numbers, tensor_of_block and stride of triton_kernels.py. The host does not wait for them."""
    group = batch.group
    names = ("X", "G", "PREV", "M", "V", "STEP", "COMPENSATION")
    beta1, beta2 = group["betas"]
    lr, n = batch.lr, len(rows["X"])
    sizes = [param.numel() for param in rows["X"]]
    first_blocks = [0, *itertools.accumulate(-(-size // BLOCK) for size in sizes)]
    stride = n + 2 - n % 2  # even, so that every row is aligned to 16 bytes, and with room for first_blocks
    decay, max_norm = 1 - lr * batch.weight_decay, group["max_norm"] or 0.0
    hyperparameters = (batch.kappa, beta1, beta2, group["eps"], batch.momentum_gamma, lr, decay, max_norm)
    data = array("q", array("d", hyperparameters).tobytes())
    for row in (sizes, first_blocks, *([t.data_ptr() for t in rows.get(name, ())] for name in names)):
        data.extend(row)
        data.extend([0] * (stride - len(row)))
    on_device = torch.frombuffer(data, dtype=torch.int64)
    if device.type == "cuda":
        on_device = on_device.pin_memory().to(device, non_blocking=True)
    table = on_device[len(hyperparameters) :]
    counts = table[stride + 1 : stride + 1 + n] - table[stride : stride + n]
    tensor_of_block = torch.repeat_interleave(counts, output_size=first_blocks[-1])
    return table, on_device[: len(hyperparameters)].view(torch.float64), tensor_of_block, stride


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, _TRITON_NAMES[dtype])
