"""The variance-reduced gradient c_t, its clip, and the momentum m_t made of it (arXiv:2411.10438, Algorithms 1, 5, 6).

κ = γ·β1/(1−β1) throughout. Lists run over the parameters of one group; nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scaling(gamma: float, beta1: float) -> float:
    """κ = γ·β1/(1−β1), the weight of the gradient difference (paper, eq. 2.3)."""
    return gamma * beta1 / (1 - beta1)


def corrected_gradient(
    grads: list[Tensor],
    previous_grads: list[Tensor] | None,
    *,
    kappa: float,
    max_norm: float | None,
) -> list[Tensor]:
    """c̃_t of every parameter: c_t = g_t + κ (g_t − g_prev), then c_t / max(1, ‖c_t‖₂ / max_norm).

    Args:
        grads: g_t. Not modified.
        previous_grads: g_{t−1} (approximate form) or ∇f(x_{t−1}, ξ_t) (exact form), of the same shapes. Overwritten:
            the result takes their memory. None where κ is zero.
        kappa: κ.
        max_norm: largest ‖c̃_t‖₂ of one parameter tensor; None leaves c_t alone.
    """
    if previous_grads is None:
        return grads if max_norm is None else torch._foreach_div(grads, _clip_denominators(grads, max_norm))
    c = previous_grads
    torch._foreach_lerp_(c, grads, 1 + kappa)  # g_prev + (1+κ)(g_t − g_prev) = g_t + κ (g_t − g_prev)
    if max_norm is not None:
        torch._foreach_div_(c, _clip_denominators(c, max_norm))
    return c


def _clip_denominators(c: list[Tensor], max_norm: float) -> list[Tensor]:
    """max(1, ‖c‖₂ / max_norm) of every tensor, as 0-d tensors on its device: reading them would stall it."""
    # Out of place: the norm of a sharded tensor is a sum still to be made, which in-place arithmetic refuses.
    return torch._foreach_clamp_min(torch._foreach_div(torch._foreach_norm(c), max_norm), 1.0)


def remember(last_grads: list[Tensor], grads: list[Tensor]) -> None:
    """Write g_t over the g_{t−1} that this step used up.

    By value, since zero_grad(set_to_none=False), DDP's bucket views and gradient-reusing engines write into the very
    tensors in ``grads``. Non-finite entries become zero: one bad gradient must not stay in the correction.
    """
    for last_grad, grad in zip(last_grads, grads, strict=True):
        torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0, out=last_grad)


def momentum(exp_avgs: list[Tensor], c: list[Tensor], *, beta1: float, gamma: float) -> list[Tensor]:
    """m_t = β1 m_{t−1} + (1−β1) c̃_t, updated in ``exp_avgs`` and returned.

    With γ > 0, ``c`` is the plain g_t and ``exp_avgs`` hold e_t, its exponential moving average; then the unclipped
    recursion telescopes to m_t = (1−γ) e_t + γ g_t, and no g_{t−1} has to be kept. c_1 = g_1 becomes
    e_0 = −γ/(1−γ) g_1, see :func:`initial_average`.
    """
    torch._foreach_lerp_(exp_avgs, c, 1 - beta1)
    return torch._foreach_lerp(exp_avgs, c, gamma) if gamma else exp_avgs


def initial_average(grad: Tensor, gamma: float) -> Tensor:
    """e_0 = −γ/(1−γ) g_1, with which m_1 = (1−β1) g_1, as for c_1 = g_1. Needs γ < 1."""
    return grad * (-gamma / (1 - gamma))
