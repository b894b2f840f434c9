"""MARS-Shampoo's update (arXiv:2411.10438, Algorithm 4) and MARS-M's (arXiv:2510.21800): they differ in the scale."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .correction import momentum
from .newton_schulz import orthogonalize
from .sharding import local, on_whole_matrices


def shampoo(
    params: list[Tensor],
    c: list[Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
    *,
    gamma: float,
    replicas: ProcessGroup | None = None,
) -> None:
    """m_t = β1 m_{t−1} + (1−β1) c̃_t;  x ← x − η ( s · NewtonSchulz(m_t) + λ x ).

    Modifies the parameters and "exp_avg" in their state; not ``c``. ``gamma`` is passed on to
    :func:`~hf_mars.optim.correction.momentum`, ``replicas`` to :func:`~hf_mars.optim.sharding.on_whole_matrices`.
    """
    m = momentum([local(state["exp_avg"]) for state in states], c, beta1=group["betas"][0], gamma=gamma)

    def orthogonal(tensors: list[Tensor]) -> list[Tensor]:
        matrices = [as_matrix(x, group["layout"]) for x in tensors]
        results = orthogonalize(matrices, group["ns_steps"])
        return [result.reshape(x.shape) for result, x in zip(results, tensors, strict=True)]

    for param, update in zip(params, on_whole_matrices(orthogonal, m, params, replicas), strict=True):
        s = scale(as_matrix(param, group["layout"]).shape, group["layout"], group["adjust_lr_fn"])
        if group["weight_decay"]:
            local(param).mul_(1 - group["lr"] * group["weight_decay"])
        local(param).add_(update, alpha=-group["lr"] * s)


def as_matrix(tensor: Tensor, layout: str) -> Tensor:
    """The matrix, or stack of matrices, that a parameter of two or more dimensions is: shape (…, m, n).

    A convolution (four dimensions, or ``layout`` "conv") is (out, everything else); three dimensions are a stack.
    """
    return tensor.flatten(1) if layout == "conv" or tensor.ndim > 3 else tensor


def scale(shape: torch.Size, layout: str, adjust_lr_fn: str) -> float:
    """s of the update of a matrix of ``shape`` (…, m, n).

    "original": √max(1, fan_out/fan_in); which of m and n is fan_out, ``layout`` says. "match_rms_adamw":
    0.2·√max(m, n), which gives the update the root mean square of AdamW's (Liu et al., "Muon is Scalable for LLM
    Training", arXiv:2502.16982, section 2.2).
    """
    m, n = shape[-2:]
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(m, n))
    fan_out, fan_in = (n, m) if layout == "in_out" else (m, n)
    return math.sqrt(max(1.0, fan_out / fan_in))
