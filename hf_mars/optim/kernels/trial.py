"""A first step of the Triton kernels on a device, beside the same step by torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..algorithm.adamw import adamw
from ..algorithm.correction import clipped, corrected_gradient, kappa, momentum, move
from ..algorithm.shampoo import update_scale
from ..batch import Batch
from ..form import Form
from ..sharding import WHOLE

LR, BETA1, BETA2, EPS, WEIGHT_DECAY, GAMMA, MAX_NORM = 0.1, 0.9, 0.99, 1e-3, 0.1, 0.1, 1.0
TOLERANCE = 1e-5  # of float32, after a dozen roundings


def trial_batch(device: torch.device, block: int) -> tuple[Batch, dict[str, list[Tensor]]]:
    """MARS-AdamW's step to take, and its results by torch's kernels: x, m, v and g_{t−1}.

    A tensor of less than a block, and one of a whole block and three elements, whose c_t is clipped.
    """
    x, g, previous, m = (
        [scale * torch.linspace(-1, 1 + shift, n, dtype=torch.float32, device=device) for n, scale in sizes]
        for shift, sizes in (
            (0.3, ((5, 1.0), (block + 3, 1.0))),
            (0.5, ((5, 0.01), (block + 3, 1.0))),
            (0.7, ((5, 0.01), (block + 3, 0.5))),
            (0.1, ((5, 0.1), (block + 3, 0.1))),
        )
    )
    v = [t.square() for t in m]
    steps = [torch.full((), 3.0, dtype=torch.float32, device=device) for _ in x]
    group = {"update": "adamw", "lr": LR, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": WEIGHT_DECAY}
    group.update(gamma=GAMMA, max_norm=MAX_NORM, skip_nonfinite=False)
    batch = Batch(group, Form.APPROX, x, g, previous, m, v, steps, [], [{}, {}], [WHOLE, WHOLE])
    expected = {name: [t.clone() for t in row] for name, row in _results(batch).items()}
    c = corrected_gradient(g, [t.clone() for t in previous], kappa=kappa(GAMMA, BETA1))
    c = clipped(c, [t.norm() for t in c], MAX_NORM, in_place=True)
    adamw(
        *(expected["parameter"], c, expected["moving average"], expected["moving average of squares"]),
        [t.clone() for t in steps],
        lr=LR,
        beta1=BETA1,
        beta2=BETA2,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        foreach=False,
        fused=False,
    )
    expected["last gradient"] = g
    return batch, expected


def trial_of_matrices(device: torch.device, block: int) -> tuple[Batch, dict[str, list[Tensor]], Tensor]:
    """MARS-Shampoo's step to take, its results by torch's kernels: x, m and g_{t−1}, and the updates to take it with.

    Two matrices of a whole block and a half; c_t of one is clipped. Updates: (2, m, n).
    """
    ramp = torch.linspace(-1, 1.3, 3 * block, dtype=torch.float32, device=device).view(2, 3, block // 2)
    x, g, previous, m = ([scale * t.contiguous() for t in ramp] for scale in (1.0, 0.04, 0.02, 0.1))
    group = {"update": "shampoo", "lr": LR, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": WEIGHT_DECAY}
    group.update(gamma=GAMMA, max_norm=MAX_NORM, skip_nonfinite=False)
    group.update(layout="out_in", ns_steps=5, adjust_lr_fn="match_rms_adamw")
    batch = Batch(group, Form.APPROX, x, g, previous, m, [], [], [], [{}, {}], [WHOLE, WHOLE])
    updates = ramp.flip(0).contiguous()
    expected = {name: [t.clone() for t in row] for name, row in _results(batch).items()}
    c = corrected_gradient(g, [t.clone() for t in previous], kappa=kappa(GAMMA, BETA1))
    c = clipped(c, [t.norm() for t in c], MAX_NORM, in_place=True)
    momentum(expected["moving average"], c, beta1=BETA1, gamma=0.0)
    rate = LR * update_scale(x[0].shape, "out_in", "match_rms_adamw")
    move(expected["parameter"], list(updates), rates=[rate] * 2, decay=1 - LR * WEIGHT_DECAY, flag=None)
    expected["last gradient"] = g
    return batch, expected, updates


def what_differs(batch: Batch, expected: dict[str, list[Tensor]]) -> str | None:
    """The first of a step's results that is not as expected. The host waits for it."""
    for name, row in _results(batch).items():
        for actual, wanted in zip(row, expected[name], strict=True):
            if not bool((actual - wanted).abs().max() <= TOLERANCE * wanted.abs().max()):
                return name
    return None


def _results(batch: Batch) -> dict[str, list[Tensor]]:
    assert batch.previous_grads is not None
    return {
        "parameter": batch.params,
        "moving average": batch.exp_avgs,
        "moving average of squares": batch.exp_avg_sqs,
        "last gradient": batch.previous_grads,
    }
