"""MARS-AdamW's and MARS-Lion's step on CPUs in one compiled pass over memory (``_cpu.c``).

Correction, clip, moving averages and update of adamw.py and lion.py at once: on a CPU the passes over memory are what
a step costs. Where the package was installed without a C compiler, or torch's threads are not OpenMP's, the module is
missing and steps are composed of torch's kernels, with the same results to rounding.
"""

from __future__ import annotations

import math
from array import array
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .batch import Batch
from .correction import scaling
from .last_grad import LastNorms, remember

try:
    from . import _cpu
except ImportError:
    _cpu = None

_PLAIN = {(cls, torch.float32, True, True) for cls in (Tensor, Parameter)}  # on the CPU and contiguous


def is_compiled() -> bool:
    """Whether the compiled step is there at all."""
    return _cpu is not None


def can_step(batch: Batch) -> bool:
    """Whether :func:`step` can take a group's step: plain contiguous float32 tensors, and the choice of kernels ours.

    Groups that get AdamW as it is are torch's.
    """
    params, states, previous_grads, group = batch.params, batch.states, batch.previous_grads, batch.group
    if _cpu is None or torch.compiler.is_compiling() or group["foreach"] is not None or not group["fused"]:
        return False
    if group["update"] == "adamw" and previous_grads is None and group["max_norm"] is None:
        return False
    if group["update"] not in ("adamw", "lion"):
        return False
    lists = [params, batch.grads, previous_grads or batch.grads, *_averages(states, group)]
    scalars = [state["step"] for state in states] if group["update"] == "adamw" else []
    # In one expression each: hundreds of tensors may be small, and loops over them take as long as their step.
    if not {(type(t), t.dtype, t.is_cpu, t.is_contiguous()) for ts in [*lists, scalars] for t in ts} <= _PLAIN:
        return False
    # A state of another shape was loaded from another model: torch's kernels will say so.
    shapes = [param.shape for param in params]
    return all([t.shape for t in ts] == shapes for ts in lists[2:])


def step(batch: Batch, last_norms: LastNorms) -> None:
    """c_t, c̃_t, m_t (and v_t), the update, and g_t in the place of g_{t−1}, of all parameters of a batch.

    Modifies the parameters and their states; may overwrite ``batch.previous_grads``.

    Args:
        batch: as :func:`can_step` wants it. Gradients are not modified.
        last_norms: what is known of ‖g_{t−1}‖₂; brought up to date.
    """
    params, grads, states, previous_grads = batch.params, batch.grads, batch.states, batch.previous_grads
    group = batch.group
    beta1, beta2 = group["betas"]
    exp_avgs, *exp_avg_sqs = _averages(states, group)
    known = last_norms.take(previous_grads) if batch.keeps_last_grad else [None] * len(params)
    norms = array("d", [math.nan if norm is None else norm for norm in known])
    finite = _cpu.step(
        array("q", [param.numel() for param in params]),
        _addresses(params),
        _addresses(exp_avgs),
        _addresses(exp_avg_sqs[0]) if exp_avg_sqs else None,
        _addresses(grads),
        None if previous_grads is None else _addresses(previous_grads),
        norms,
        _addresses([state["step"] for state in states]) if exp_avg_sqs else None,
        scaling(group["gamma"], beta1),
        beta1,
        beta2,
        group["eps"],
        batch.gamma,
        group["lr"],
        group["weight_decay"],
        group["max_norm"] or 0.0,
        torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version(params)  # they were changed behind autograd's back
    if batch.keeps_last_grad:
        kept = remember(previous_grads, grads, finite)
        for state, last_grad in zip(states, kept, strict=True):
            state["last_grad"] = last_grad
        last_norms.remember(kept, norms)


def _averages(states: list[dict[str, Any]], group: dict[str, Any]) -> list[list[Tensor]]:
    keys = ("exp_avg", "exp_avg_sq") if group["update"] == "adamw" else ("exp_avg",)
    return [[state[key] for state in states] for key in keys]


def _addresses(tensors: list[Tensor]) -> array:
    return array("q", [t.data_ptr() for t in tensors])
