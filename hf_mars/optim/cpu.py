"""MARS-AdamW's and MARS-Lion's step on CPUs in one compiled pass over memory (``_cpu.c``).

Correction, clip, moving averages and update of adamw.py and lion.py at once: on a CPU the passes over memory are what
a step costs. Where the package was installed without a C compiler, or torch's threads are not OpenMP's, the module is
missing and steps are composed of torch's kernels, with the same results to rounding.
"""

from __future__ import annotations

from array import array
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .correction import scaling

try:
    from . import _cpu
except ImportError:
    _cpu = None

_PLAIN = (Tensor, Parameter)


def is_compiled() -> bool:
    """Whether the compiled step is there at all."""
    return _cpu is not None


def can_step(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    previous_grads: list[Tensor] | None,
    group: dict[str, Any],
) -> bool:
    """Whether :func:`step` can take a group's step: plain contiguous float32 tensors, and the choice of kernels ours.

    Groups that get AdamW as it is are torch's.
    """
    if _cpu is None or torch.compiler.is_compiling() or group["foreach"] is not None or not group["fused"]:
        return False
    if group["update"] == "adamw" and previous_grads is None and group["max_norm"] is None:
        return False
    if group["update"] not in ("adamw", "lion"):
        return False
    for tensors in (params, grads, previous_grads or grads, *_averages(states, group)):
        # Loops, since hundreds of them may be small, and generators would take longer than their step.
        for param, t in zip(params, tensors, strict=True):
            if t.dtype is not torch.float32 or not t.is_cpu or not t.is_contiguous() or type(t) not in _PLAIN:
                return False
            if t.shape != param.shape:  # a state that was loaded from another model: torch's kernels will say so
                return False
    return True


def step(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    previous_grads: list[Tensor] | None,
    group: dict[str, Any],
    *,
    gamma: float,
) -> list[bool]:
    """c_t, c̃_t, m_t (and v_t), and the update, of all parameters.

    Modifies the parameters and, in their state, "exp_avg" and (AdamW) "exp_avg_sq" and "step".

    Args:
        params, grads, previous_grads: float32, contiguous, on the CPU. Gradients are not modified.
        states: as :func:`~hf_mars.optim.adamw.adamw` and :func:`~hf_mars.optim.lion.lion` expect them.
        group: the group's settings.
        gamma: as :func:`~hf_mars.optim.correction.momentum` expects it.

    Returns:
        For each parameter whether c̃_t was finite, as it is only where g_t is.
    """
    beta1, beta2 = group["betas"]
    lr, is_adamw = float(group["lr"]), group["update"] == "adamw"
    exp_avgs, *exp_avg_sqs = _averages(states, group)
    step_sizes = root_bias2 = None
    if is_adamw:
        torch._foreach_add_([state["step"] for state in states], 1.0)
        ts = [state["step"].item() for state in states]
        step_sizes = array("d", [lr / (1 - beta1**t) for t in ts])
        root_bias2 = array("d", [(1 - beta2**t) ** 0.5 for t in ts])
    finite = _cpu.step(
        array("q", [param.numel() for param in params]),
        _addresses(params),
        _addresses(exp_avgs),
        _addresses(exp_avg_sqs[0]) if is_adamw else None,
        _addresses(grads),
        None if previous_grads is None else _addresses(previous_grads),
        step_sizes,
        root_bias2,
        0.0 if previous_grads is None else 1 + scaling(group["gamma"], beta1),
        1 - beta1,
        beta2,
        1 - beta2,
        group["eps"],
        gamma,
        lr,
        1 - lr * group["weight_decay"],
        group["max_norm"] or 0.0,
        torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version(params)  # they were changed behind autograd's back
    return finite


def _averages(states: list[dict[str, Any]], group: dict[str, Any]) -> list[list[Tensor]]:
    keys = ("exp_avg", "exp_avg_sq") if group["update"] == "adamw" else ("exp_avg",)
    return [[state[key] for state in states] for key in keys]


def _addresses(tensors: list[Tensor]) -> array:
    return array("q", [t.data_ptr() for t in tensors])
