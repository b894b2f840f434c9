"""MARS-Shampoo's update (arXiv:2411.10438, Algorithm 4) and MARS-M's (arXiv:2510.21800): they differ in s."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .correction import momentum, move
from .newton_schulz import has_bfloat16, in_bfloat16, orthogonalize


def shampoo(
    params: list[Tensor],
    c: list[Tensor],
    exp_avgs: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    weight_decay: float,
    gamma: float,
    ns_steps: int | None,
    layout: str,
    update_scales: list[float],
    on_wholes: Callable[..., list[Tensor]],
    flag: Tensor | None = None,
) -> None:
    """m_t = β1 m_{t−1} + (1−β1) c̃_t;  x ← x − η ( s · NewtonSchulz(m_t) + λ x ).

    Modifies the parameters and `exp_avgs`; not `c`.

    Args:
        params, c, exp_avgs: x, c̃_t, m_{t−1}: parts of tensors, of the same shapes.
        gamma: for `correction.momentum`.
        ns_steps: Newton–Schulz iterations; None takes the singular value decomposition.
        layout: how the matrices are stored, see `hf_mars.optim.ParameterRole`.
        update_scales: s of each tensor, see `update_scale`.
        on_wholes: applies a function of whole tensors to this process's parts of them, as
            `sharding.on_whole_matrices` does.
        flag: for `correction.move`.
    """
    m = momentum(exp_avgs, c, beta1=beta1, gamma=gamma)

    def orthogonal(wholes: list[Tensor]) -> list[Tensor]:
        results = orthogonalize([as_matrix(x, layout) for x in wholes], ns_steps)
        return [result.reshape(x.shape) for result, x in zip(results, wholes, strict=True)]

    def halves(shape: torch.Size) -> bool:
        return ns_steps is not None and in_bfloat16(as_matrix(torch.empty(shape, device="meta"), layout).shape, m[0])

    updates = on_wholes(orthogonal, m, in_bfloat16=halves, has_bfloat16=has_bfloat16(m[0]))
    move(params, updates, rates=[lr * s for s in update_scales], decay=1 - lr * weight_decay, flag=flag)


def as_matrix(tensor: Tensor, layout: str) -> Tensor:
    """The matrix, or stack of matrices, that a parameter of two or more dimensions is: shape (…, m, n).

    A convolution (four dimensions, or `layout` "conv") is (out, everything else); three dimensions are a stack.
    """
    return tensor.flatten(1) if layout == "conv" or tensor.ndim > 3 else tensor


def update_scale(shape: torch.Size, layout: str, adjust_lr_fn: str) -> float:
    """s of the update of a parameter of `shape`.

    With (m, n) the shape of its matrices, "original" is √max(1, fan_out/fan_in); `layout` says which of m and n is
    fan_out. "match_rms_adamw" is 0.2·√max(m, n), which gives the update the root mean square of AdamW's (Liu et al.,
    "Muon is Scalable for LLM Training", arXiv:2502.16982, section 2.2).
    """
    is_convolution = layout == "conv" or len(shape) > 3
    m, n = (shape[0], math.prod(shape[1:])) if is_convolution else shape[-2:]
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(m, n))
    fan_out, fan_in = (n, m) if layout == "in_out" else (m, n)
    return math.sqrt(max(1.0, fan_out / fan_in))
