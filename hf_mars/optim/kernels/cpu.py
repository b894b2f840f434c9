"""MARS-AdamW's and MARS-Lion's step on CPUs in one compiled pass over memory (`_cpu.c`).

Correction, clip, moving averages and update at once: on a CPU the passes over memory are the cost of a step. Where the
package was installed without a C compiler, or torch's threads are not OpenMP's, the module is missing and steps are
composed of torch's kernels, with the same results to rounding.
"""

from __future__ import annotations

import math
from array import array
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import Parameter

from ..batch import Batch
from ..form import Form
from ..last_grad import LastNorms

_cpu: ModuleType | None
try:
    _cpu = import_module("._cpu", __package__)
except ImportError:
    _cpu = None

_PLAIN = {(cls, torch.float32, True, True) for cls in (Tensor, Parameter)}  # on the CPU and contiguous


def is_compiled() -> bool:
    """Whether the compiled step is there at all."""
    return _cpu is not None


def is_for(device: torch.device) -> bool:
    """Whether this execution is for tensors on `device`."""
    return device.type == "cpu"


def why_not(batch: Batch) -> str | None:
    """Why `step` cannot take a batch; None if it can.

    It takes plain contiguous float32 tensors, where the choice of kernels is ours. Groups that get AdamW as it is are
    torch's.
    """
    group = batch.group
    if group["update"] not in ("adamw", "lion"):
        return "kernels are for MARS-AdamW and MARS-Lion"
    if group["foreach"] is not None or not group["fused"]:
        return f"foreach={group['foreach']}, fused={group['fused']}"
    if group["update"] == "adamw" and batch.previous_grads is None and group["max_norm"] is None:
        return "plain AdamW has a fused one there"
    if _cpu is None:
        return "the compiled step is missing (no C compiler at installation, or torch's threads are not OpenMP's)"
    if not batch.is_whole:
        return "parameters are sharded"
    averages = [batch.exp_avgs, batch.exp_avg_sqs] if group["update"] == "adamw" else [batch.exp_avgs]
    lists = [batch.params, batch.grads, batch.previous_grads or batch.grads, *averages]
    # In one expression each: hundreds of tensors may be small, and loops over them take as long as their step.
    if not {(type(t), t.dtype, t.is_cpu, t.is_contiguous()) for ts in [*lists, batch.steps] for t in ts} <= _PLAIN:
        return "not all tensors are plain contiguous float32 tensors"
    shapes = [param.shape for param in batch.params]
    if not all([t.shape for t in ts] == shapes for ts in lists[2:]):
        return "a state has another shape than its parameter"  # of another model: torch's kernels raise
    return None


def step(batches: list[Batch], last_norms: LastNorms) -> None:
    """c_t, c̃_t, m_t (and v_t), the update, and g_t in the place of g_{t−1}, as `execution.Execution` says."""
    for batch in batches:
        _step(batch, last_norms)


def _step(batch: Batch, last_norms: LastNorms) -> None:
    assert _cpu is not None
    params, group, previous_grads = batch.params, batch.group, batch.previous_grads
    keeps_last_grad = batch.form is Form.APPROX
    beta1, beta2 = group["betas"]
    known = last_norms.take(previous_grads) if keeps_last_grad and previous_grads else [None] * len(params)
    norms = array("d", [math.nan if norm is None else norm for norm in known])
    is_adamw = group["update"] == "adamw"
    finite = _cpu.step(
        array("q", [param.numel() for param in params]),
        _addresses(params),
        _addresses(batch.exp_avgs),
        _addresses(batch.exp_avg_sqs) if is_adamw else None,
        _addresses(batch.grads),
        None if previous_grads is None else _addresses(previous_grads),
        norms,
        _addresses(batch.steps) if is_adamw else None,
        batch.kappa,
        beta1,
        beta2,
        group["eps"],
        batch.momentum_gamma,
        batch.lr,
        batch.weight_decay,
        group["max_norm"] or 0.0,
        torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version(params)  # they were changed behind autograd's back
    if keeps_last_grad:
        last_norms.remember(batch.keep_last_grads(finite), norms.tolist())


def _addresses(tensors: list[Tensor]) -> array[int]:
    return array("q", [t.data_ptr() for t in tensors])
