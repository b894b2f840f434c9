"""What the coming step of a MARS optimizer will do, in a few numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .correction import scaling
from .groups import KINDS
from .mars import Mars
from .sharding import whole


@torch.no_grad()
def step_diagnostics(optimizer: Mars) -> dict[str, float]:
    """Describe the step that ``optimizer.step()`` would take with the present gradients. Changes nothing.

    Sums run over all elements of all tensors that have a gradient and are corrected (γ > 0: not the 1d parameters, by
    default). Call it between the last backward pass and ``step()``, on every rank. It reads the device once and needs
    memory for two copies of the largest gradient.

    Returns:
        "correction_ratio": ‖κ (g_t − g_prev)‖ / ‖g_t‖, where g_prev is g_{t−1}, in exact mode ∇f(x_{t−1}, ξ_t). Zero
            at a tensor's first gradient, where c_1 = g_1.
        "gradient_cosine": ⟨g_t, g_prev⟩ / (‖g_t‖ ‖g_prev‖), over the tensors that have a g_prev.
        "clipped_fraction": the number of tensors with ‖c_t‖ > max_norm, over those that have a max_norm.
        "lr_matrix", "lr_embedding", "lr_1d": the learning rate of the first group of that kind.

        A value that cannot be known, or that divides zero by zero, is left out: the first two where the optimizer
        keeps no g_{t−1} of a corrected tensor (γ = 0, or Lion and Shampoo with max_norm=None).
    """
    rates: dict[str, float] = {}
    sums: list[Tensor] = []
    previous_known = True
    for group in optimizer.param_groups:
        params = [param for param in group["params"] if param.grad is not None]
        if group["params"]:
            rates.setdefault(f"lr_{group['kind']}", float(group["lr"]))
        kappa = scaling(group["gamma"], group["betas"][0])
        if kappa == 0 and group["max_norm"] is None:
            continue
        for param in params:
            previous = _previous_gradient(optimizer, param, group["exact"]) if kappa else None
            if kappa and previous is None and not group["exact"] and "exp_avg" in optimizer.state[param]:
                previous_known = False  # one moving average does the correction's work; there is no clip either
                continue
            sums.append(_tensor_sums(param.grad, previous, kappa, group["max_norm"]))
    measured = _ratios(sums, previous_known) if sums else {}
    return {**measured, **{name: rates[name] for name in (f"lr_{kind}" for kind in KINDS) if name in rates}}


def _previous_gradient(optimizer: Mars, param: Tensor, exact: bool) -> Tensor | None:
    """What κ's bracket subtracts from g_t; None at a tensor's first gradient, where it subtracts g_t itself."""
    if not exact:
        return optimizer.state[param]["last_grad"] if "last_grad" in optimizer.state.get(param, ()) else None
    if not optimizer._previous_grads:
        return None
    previous = optimizer._previous_grads.get(param)
    return torch.zeros_like(param.grad) if previous is None else previous


def _tensor_sums(grad: Tensor, previous: Tensor | None, kappa: float, max_norm: float | None) -> Tensor:
    """One tensor's terms of the sums that :func:`_ratios` divides, float64, on the tensor's device.

    In order: corrected ‖g‖², ‖κ (g − g_prev)‖²; ⟨g, g_prev⟩, ‖g‖² and ‖g_prev‖² where there is a g_prev; whether the
    tensor is clipped; whether it can be.
    """
    g = grad.to(torch.promote_types(grad.dtype, torch.float32))  # products of halves leave their range
    norm = _norm(g)
    zero = torch.zeros_like(norm)
    difference, product, previous_norm, corrected_norm = zero, zero, zero, norm
    if previous is not None:
        p = previous.to(g.dtype)
        product, previous_norm = whole((g * p).sum()).double(), _norm(p)
        scaled = (g - p).mul_(kappa)
        difference = _norm(scaled)
        corrected_norm = _norm(scaled.add_(g))
    squared = norm**2
    return torch.stack(
        [
            squared if kappa else zero,
            difference**2,
            product,
            squared if previous is not None else zero,
            previous_norm**2,
            zero if max_norm is None else (corrected_norm > max_norm).to(norm.dtype),
            zero + (max_norm is not None),
        ]
    )


def _norm(tensor: Tensor) -> Tensor:
    return whole(torch.linalg.vector_norm(tensor)).double()


def _ratios(sums: list[Tensor], previous_known: bool) -> dict[str, float]:
    device = sums[0].device  # a model may be spread over several
    total = torch.stack([s.to(device, non_blocking=True) for s in sums]).sum(0).tolist()
    corrected, difference, product, with_previous, previous, clipped, clippable = total
    ratios = {}
    if previous_known and corrected != 0:
        ratios["correction_ratio"] = (difference / corrected) ** 0.5
    if previous_known and with_previous * previous != 0:
        ratios["gradient_cosine"] = product / (with_previous**0.5 * previous**0.5)
    if clippable:
        ratios["clipped_fraction"] = clipped / clippable
    return ratios
