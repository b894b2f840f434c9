"""MARS-Lion's update (arXiv:2411.10438, Algorithm 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .correction import momentum


def lion(
    params: list[Tensor], c: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any], *, gamma: float
) -> None:
    """m_t = β1 m_{t−1} + (1−β1) c̃_t;  x ← x − η ( sign(m_t) + λ x ).

    Modifies the parameters and "exp_avg" in their state; not ``c``. ``gamma`` is passed on to
    :func:`~hf_mars.optim.correction.momentum`.
    """
    m = momentum([state["exp_avg"] for state in states], c, beta1=group["betas"][0], gamma=gamma)
    torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
    torch._foreach_add_(params, torch._foreach_sign(m), alpha=-group["lr"])
