"""MARS-AdamW's update (arXiv:2411.10438, Algorithm 2): AdamW with c̃_t in the gradient's place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw


def adamw(
    params: list[Tensor],
    c: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    foreach: bool | None,
    fused: bool | None,
    flag: Tensor | None = None,
) -> None:
    """m_t = β1 m_{t−1} + (1−β1) c̃_t;  v_t = β2 v_{t−1} + (1−β2) c̃_t²;
    x ← x − η ( (m_t/(1−β1^t)) / (√(v_t/(1−β2^t)) + ε) + λ x ).

    torch's own kernel does it (`foreach`, `fused` choose which). Modifies the parameters, m (`exp_avgs`), v
    (`exp_avg_sqs`) and t (`steps`, 0-d float32); not `c`. Where `flag` is raised, a float32 number on the device, a
    fused kernel changes nothing; the others take none.
    """
    if torch.compiler.is_compiling():
        # The compiler fuses by itself, and cannot look into a fused kernel: vertically, and on accelerators, of lists,
        # horizontally too, where one launch per tensor would cost more than its work.
        foreach, fused = not params[0].is_cpu, False
    torch_adamw(
        params,
        c,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        foreach=foreach,
        fused=fused or None,  # with False, torch would not choose foreach by itself
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
        found_inf=flag,
    )
