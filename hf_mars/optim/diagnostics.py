"""What the coming step of a MARS optimizer will do, in a few numbers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .form import kappa_of
from .groups import KINDS
from .mars import Mars
from .sharding import Part, add_up, norms_of_wholes, part_of


class _Sums(NamedTuple):
    """⟨g, g⟩, ⟨g, d⟩ and ⟨d, d⟩ over the elements of one tensor, with d = g − g_prev."""

    gg: float
    gd: float
    dd: float


@torch.no_grad()
def step_diagnostics(optimizer: Mars) -> dict[str, float]:
    """Describe the step that `optimizer.step()` would take with the present gradients. Changes nothing.

    Call it between the last backward pass and `step()`, on every rank. It reads the device once and needs memory
    for about one copy of the largest gradient (of each rank's part of it).

    Returns:
        "correction_ratio": ‖κ (g_t − g_prev)‖ / ‖g_t‖ over all elements of all tensors with a gradient and γ > 0 (not
            the 1d parameters, by default). g_prev is g_{t−1}, in exact mode ∇f(x_{t−1}, ξ_t); at a tensor's first
            gradient it is g_t itself, since c_1 = g_1.
        "gradient_cosine": ⟨g_t, g_prev⟩ / (‖g_t‖ ‖g_prev‖) over those of them whose first gradient is past.
        "clipped_fraction": the number of tensors with ‖c_t‖ > max_norm, over those that have a max_norm.
        "lr_matrix", "lr_embedding", "lr_1d": the learning rate of the first group of that kind.

        A value that cannot be known, or that would divide by zero, is left out: the first two where no tensor is
        corrected (γ = 0) or the optimizer does without g_{t−1} (Lion and Shampoo with max_norm=None).
    """
    parts, sums = [], []
    settings: list[tuple[dict[str, Any], bool]] = []
    rates: dict[str, float] = {}
    previous_known = True
    clip = optimizer.global_clip.of_gradients(optimizer.param_groups)
    for group in optimizer.param_groups:
        if group["params"]:
            rates.setdefault(group["kind"], float(group["lr"]))
        kappa = kappa_of(group)
        if kappa == 0 and group["max_norm"] is None:
            continue
        for param in group["params"]:
            if param.grad is None:
                continue
            part = part_of(param)
            grad = part.of(param.grad)
            factor = None if clip is None else clip.factor_on(grad.device)
            grad = grad if factor is None else grad * factor  # g_t
            previous = _previous_gradient(optimizer, param, part, grad, group["exact"]) if kappa else None
            if kappa and previous is None and not group["exact"] and "exp_avg" in optimizer.state.get(param, ()):
                previous_known = False  # a single moving average does the correction's work
                continue
            parts.append(part)
            sums.append(_local_sums(grad, previous))
            settings.append((group, previous is not None))
    whole = add_up(sums, parts)
    # One read of the device, though a model may be on several.
    rows = [_Sums(*row) for row in torch.stack([s.to(whole[0].device) for s in whole]).tolist()] if whole else []
    ratios = _ratios(rows, settings, previous_known)
    return {**ratios, **{f"lr_{kind}": rates[kind] for kind in KINDS if kind in rates}}


@torch.no_grad()
def not_finite(optimizer: Mars, which: str) -> list[Tensor]:
    """The parameters whose gradient ("grad") or momentum ("exp_avg") is not finite: the same ones on every rank."""
    pairs = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            value = param.grad if which == "grad" else optimizer.state.get(param, {}).get(which)
            if value is not None:
                pairs.append((param, value))
    parts = [part_of(param) for param, _ in pairs]
    norms = norms_of_wholes([part.of(value) for part, (_, value) in zip(parts, pairs, strict=True)], parts)
    values = torch.stack([norm.to(norms[0].device) for norm in norms]).tolist() if norms else []
    return [param for (param, _), value in zip(pairs, values, strict=True) if not math.isfinite(value)]


def _previous_gradient(optimizer: Mars, param: Tensor, part: Part, grad: Tensor, exact: bool) -> Tensor | None:
    """This process's part of g_prev, which c_t subtracts from g_t; None at a tensor's first gradient."""
    if not exact:
        last_grad = optimizer.state.get(param, {}).get("last_grad")
        return None if last_grad is None else part.of(last_grad)
    if not optimizer.previous_grads:
        return None
    # No gradient there: the parameter took no part in this batch at x_{t−1}.
    previous = optimizer.previous_grads.get(param)
    return torch.zeros_like(grad) if previous is None else part.of(previous)


def _local_sums(grad: Tensor, previous: Tensor | None) -> Tensor:
    """`_Sums` of this rank's part of one tensor, on its device, in float32 or better."""
    g = grad.to(torch.promote_types(grad.dtype, torch.float32)).flatten()  # squares of halves leave their range
    if previous is None:
        return torch.stack([torch.dot(g, g), *g.new_zeros(2)])
    d = g - previous.flatten()
    return torch.stack([torch.dot(g, g), torch.dot(g, d), torch.dot(d, d)])


def _ratios(rows: list[_Sums], settings: list[tuple[dict[str, Any], bool]], previous_known: bool) -> dict[str, float]:
    gg = difference = squares_g = squares_prev = products = 0.0
    clippable = []
    for row, (group, has_previous) in zip(rows, settings, strict=True):
        kappa = kappa_of(group)
        if kappa > 0:
            gg += row.gg
            difference += kappa**2 * row.dd
        if has_previous:  # g_prev = g − d
            squares_g += row.gg
            products += row.gg - row.gd
            squares_prev += row.gg - 2 * row.gd + row.dd
        if group["max_norm"] is not None:  # c = g + κ d
            clippable.append(row.gg + 2 * kappa * row.gd + kappa**2 * row.dd > group["max_norm"] ** 2)
    ratios = {}
    if previous_known and gg > 0:
        ratios["correction_ratio"] = (difference / gg) ** 0.5
    if previous_known and squares_g > 0 and squares_prev > 0:
        ratios["gradient_cosine"] = products / (squares_g * squares_prev) ** 0.5
    if clippable:
        ratios["clipped_fraction"] = sum(clippable) / len(clippable)
    return ratios
