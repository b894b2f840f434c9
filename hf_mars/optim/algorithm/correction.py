"""The variance-reduced gradient c_t, its clip, and the momentum m_t made of it (arXiv:2411.10438, Algorithm 1).

Lists run over tensors that are updated alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def kappa(gamma: float, beta1: float) -> float:
    """κ = γ·β1/(1−β1), the weight of the gradient difference (paper, eq. 2.3)."""
    return gamma * beta1 / (1 - beta1)


def corrected_gradient(
    grads: list[Tensor], previous_grads: list[Tensor] | None, *, kappa: float, in_place: bool = True
) -> list[Tensor]:
    """c_t = g_t + κ (g_t − g_prev) of every tensor.

    Args:
        grads: g_t. Not modified.
        previous_grads: g_{t−1} (approximate form) or ∇f(x_{t−1}, ξ_t) (exact form), of the same shapes. None where
            c_t is g_t.
        kappa: κ.
        in_place: overwrite previous gradients of the dtype of `grads`: the result takes their memory.

    Returns:
        Tensors of the shapes and dtypes of `grads`; `grads` itself where there are no previous gradients.
    """
    if previous_grads is None:
        return grads
    c = [previous.to(grad.dtype) for previous, grad in zip(previous_grads, grads, strict=True)]
    # g_prev + (1+κ)(g_t − g_prev) = g_t + κ (g_t − g_prev)
    if not in_place:
        return list(torch._foreach_lerp(c, grads, 1 + kappa))
    torch._foreach_lerp_(c, grads, 1 + kappa)
    return c


def clipped(c: list[Tensor], norms: list[Tensor] | list[float], max_norm: float, *, in_place: bool) -> list[Tensor]:
    """c̃_t = c_t / max(1, ‖c_t‖₂ / max_norm) of every tensor.

    Args:
        c: c_t; overwritten if `in_place`.
        norms: ‖c_t‖₂ of the whole tensors: 0-d tensors, or numbers where the host knows them.
        max_norm: largest ‖c̃_t‖₂.
        in_place: whether the result may take the memory of `c`.
    """
    on_device = [norm for norm in norms if isinstance(norm, Tensor)]
    if on_device:
        denominators = torch._foreach_clamp_min(torch._foreach_div(on_device, max_norm), 1.0)
        if not in_place:
            return list(torch._foreach_div(c, denominators))
        torch._foreach_div_(c, denominators)
        return c
    # Most tensors are below max_norm most of the time, and a pass over memory is the cost of a step on a CPU.
    lengths = [float(norm) for norm in norms]
    return [
        x if length <= max_norm else (x.div_ if in_place else x.div)(length / max_norm)
        for x, length in zip(c, lengths, strict=True)
    ]


def momentum(exp_avgs: list[Tensor], c: list[Tensor], *, beta1: float, gamma: float) -> list[Tensor]:
    """m_t = β1 m_{t−1} + (1−β1) c̃_t, updated in `exp_avgs` and returned.

    With γ > 0 (the one-tensor form), `c` is the plain g_t and `exp_avgs` hold e_t, its exponential moving average: the
    unclipped recursion telescopes to m_t = (1−γ) e_t + γ g_t, and no g_{t−1} has to be kept. c_1 = g_1 becomes
    e_0 = −γ/(1−γ) g_1, see `initial_average`.
    """
    torch._foreach_lerp_(exp_avgs, c, 1 - beta1)
    return list(torch._foreach_lerp(exp_avgs, c, gamma)) if gamma else exp_avgs


def move(
    params: list[Tensor],
    updates: list[Tensor],
    *,
    rates: Sequence[float | Tensor],
    decay: float | Tensor,
    flag: Tensor | None,
) -> None:
    """x ← decay · x − rate · update of every tensor, with a rate each; nothing where `flag` is raised.

    Args:
        params: x. Modified.
        updates: finite, of the same shapes.
        rates: η times the update's scale; 0-d tensors where η is one.
        decay: 1 − ηλ, likewise.
        flag: None, or a number on the device: 1 where nothing is to change, else 0.
    """
    numbers = [rate for rate in rates if not isinstance(rate, Tensor)]
    if isinstance(decay, Tensor) or len(numbers) < len(rates):  # where η is a tensor
        scale = decay if flag is None else torch.where(flag > 0, 1.0, decay)
        for x, update, rate in zip(params, updates, rates, strict=True):
            own = rate if flag is None else rate * (1 - flag)
            x.mul_(scale).addcmul_(update, torch.as_tensor(own).to(x.dtype), value=-1)
        return
    if flag is None:
        if decay != 1:
            torch._foreach_mul_(params, decay)
        if len(set(numbers)) == 1:
            torch._foreach_add_(params, updates, alpha=-numbers[0])
            return
        for x, update, rate in zip(params, updates, numbers, strict=True):
            x.add_(update, alpha=-rate)
        return
    on = 1 - flag
    factor = torch.where(flag > 0, 1.0, decay)
    for x, update, rate in zip(params, updates, numbers, strict=True):
        x.mul_(factor).addcmul_(update, on.to(x.dtype), value=-rate)


def initial_average(grad: Tensor, gamma: float) -> Tensor:
    """e_0 = −γ/(1−γ) g_1, with which m_1 = (1−β1) g_1, as for c_1 = g_1. Needs γ < 1."""
    return grad * (-gamma / (1 - gamma))


def relative_update_rms(gamma: float, beta1: float) -> float:
    """r, the root mean square of MARS-AdamW's update relative to AdamW's where noise dominates the gradient.

    On white noise of variance σ², c_t = (1+κ) g_t − κ g_{t−1} has the second moment ((1+κ)² + κ²) σ², and
    m_t = (1−β1) [ (1+κ) g_t + (1−γ) Σ_{k≥1} β1^k g_{t−k} ]. AdamW's are σ² and (1−β1)/(1+β1) σ². Hence

        r² = (1−β1²) [ (1+κ)² + (1−γ)² β1²/(1−β1²) ] / ( (1+κ)² + κ² )

    so that r is 1 for γ = 0, and 0.67 for γ = 0.025 and β1 = 0.95.
    """
    k = kappa(gamma, beta1)
    variance_of_momentum = (1 - beta1**2) * (1 + k) ** 2 + (1 - gamma) ** 2 * beta1**2
    return math.sqrt(variance_of_momentum / ((1 + k) ** 2 + k**2))
