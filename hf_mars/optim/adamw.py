"""MARS-AdamW's update (arXiv:2411.10438, Algorithm 2): AdamW with c̃_t in the gradient's place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from .sharding import local


def adamw(
    params: list[Tensor], c: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any], *, gamma: float = 0.0
) -> None:
    """m_t = β1 m_{t−1} + (1−β1) c̃_t;  v_t = β2 v_{t−1} + (1−β2) c̃_t²;
    x ← x − η ( (m_t/(1−β1^t)) / (√(v_t/(1−β2^t)) + ε) + λ x ).

    torch's own kernel does it (``foreach``, ``fused`` choose which). Modifies the parameters and, in their state,
    "exp_avg" (m), "exp_avg_sq" (v) and "step" (t); not ``c``.
    """
    beta1, beta2 = group["betas"]
    compiling = torch.compiler.is_compiling()  # the compiler fuses by itself, and cannot look into a fused kernel
    torch_adamw(
        [local(param) for param in params],
        c,
        [local(state["exp_avg"]) for state in states],
        [local(state["exp_avg_sq"]) for state in states],
        [],
        [state["step"] for state in states],
        foreach=False if compiling else group["foreach"],
        fused=False if compiling else group["fused"],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
