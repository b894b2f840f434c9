"""One step of MARS (arXiv:2411.10438, Algorithm 1) in the paper's order, composed of torch's kernels.

This is the step that every device, dtype and layout can take, and the one to read. `kernels/` takes it in fewer passes
over memory where it can, with the same results to rounding.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .algorithm.adamw import adamw
from .algorithm.correction import clipped, corrected_gradient
from .algorithm.lion import lion
from .algorithm.shampoo import shampoo, update_scale
from .batch import Batch
from .form import Form
from .host import is_captured, reads_are_free
from .kernels import gpu
from .last_grad import LastNorms
from .precision import needs_wide_copies, widened
from .sharding import norms_of_wholes, on_whole_matrices

# Elements that are updated at a time where that takes temporary copies of them.
COPIED_AT_A_TIME = 1 << 24

# ‖c_t‖₂ of the tensors of a batch: numbers where the host may look at them, else 0-d tensors; None: not wanted.
Norms = list[float] | list[Tensor] | None


def step(batches: list[Batch], last_norms: LastNorms) -> None:
    """Update the parameters of `batches` and their states.

    All together, so that the clip's norms take one exchange between ranks per step; those that need temporary copies
    one piece after the other.
    """
    if batches and is_captured(batches[0].grads[0]):
        last_norms.distrust()
    together = [batch for batch in batches if not _takes_copies(batch)]
    pieces = [piece for batch in batches if _takes_copies(batch) for piece in batch.pieces(COPIED_AT_A_TIME)]
    for some in (together, *([piece] for piece in pieces)):
        _step(some)


def _step(batches: list[Batch]) -> None:
    # c_t = g_t + κ (g_t − g_{t−1})
    corrected = [corrected_gradient(batch.grads, batch.previous_grads, kappa=batch.kappa) for batch in batches]
    # ‖c_t‖₂
    norms = _norms(batches, corrected)
    for batch, c, norms_of_c in zip(batches, corrected, norms, strict=True):
        finite = _finite(batch, norms_of_c)
        # c̃_t = c_t / max(1, ‖c_t‖₂ / max_norm)
        max_norm = batch.group["max_norm"]
        if max_norm is not None and norms_of_c is not None:
            c = _clipped(c, norms_of_c, max_norm, in_place=batch.previous_grads is not None)
        # m_t, v_t and x_{t+1}
        if _takes_wide_copies(batch):
            with widened(batch.params, [batch.exp_avgs, batch.exp_avg_sqs], batch.compensations) as (wide, averages):
                _update(batch, wide, [x.to(wide[0].dtype) for x in c], *averages)
        else:
            _update(batch, batch.params, c, batch.exp_avgs, batch.exp_avg_sqs)
        # g_{t−1} ← g_t
        if batch.form is Form.APPROX:
            batch.keep_last_grads(finite)


def _update(
    batch: Batch, params: list[Tensor], c: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor]
) -> None:
    """The preconditioned update of `params`, by AdamW, Lion or Shampoo."""
    group = batch.group
    beta1, beta2 = group["betas"]
    lr, weight_decay, gamma = batch.lr, batch.weight_decay, batch.momentum_gamma
    if group["update"] == "adamw":
        adamw(
            params,
            c,
            exp_avgs,
            exp_avg_sqs,
            batch.steps,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=weight_decay,
            foreach=group["foreach"],
            fused=group["fused"],
        )
    elif group["update"] == "lion":
        lion(params, c, exp_avgs, lr=lr, beta1=beta1, weight_decay=weight_decay, gamma=gamma)
    elif group["update"] == "shampoo":
        shapes = [part.whole_shape(param) for part, param in zip(batch.parts, params, strict=True)]
        shampoo(
            params,
            c,
            exp_avgs,
            lr=lr,
            beta1=beta1,
            weight_decay=weight_decay,
            gamma=gamma,
            ns_steps=group["ns_steps"],
            layout=group["layout"],
            update_scales=[update_scale(shape, group["layout"], group["adjust_lr_fn"]) for shape in shapes],
            on_wholes=functools.partial(on_whole_matrices, parts=batch.parts, replicas=batch.replicas),
        )
    else:
        raise ValueError(f"update must be adamw, lion or shampoo, got {group['update']!r}")


# ---- norms and the clip ----


def _norms(batches: list[Batch], corrected: list[list[Tensor]]) -> list[Norms]:
    """‖c_t‖₂ of whole tensors, batch by batch, with one exchange between ranks."""
    wanted = [_wants_norms(batch) for batch in batches]
    measured = [(batch, c) for batch, c, wants in zip(batches, corrected, wanted, strict=True) if wants]
    tensors = [x for _, c in measured for x in c]
    values = iter(norms_of_wholes(tensors, [part for batch, _ in measured for part in batch.parts]))
    result: list[Norms] = []
    for c, wants in zip(corrected, wanted, strict=True):
        if not wants:
            result.append(None)
            continue
        norms = [next(values) for _ in c]
        result.append([norm.item() for norm in norms] if reads_are_free(c) else norms)
    return result


def _clipped(c: list[Tensor], norms: Norms, max_norm: float, *, in_place: bool) -> list[Tensor]:
    """`correction.clipped`, in a kernel of ours that leaves alone what is not clipped, where there is one."""
    if norms is None or not isinstance(norms[0], Tensor) or not gpu.divides(c):
        return clipped(c, norms or [], max_norm, in_place=in_place)
    c = c if in_place else list(torch._foreach_mul(c, 1.0))
    gpu.divide(c, (torch.stack(norms) / max_norm).clamp_(min=1.0))
    return c


def _wants_norms(batch: Batch) -> bool:
    # Without the clip they tell a CPU whether g_t is finite, for one pass over memory instead of a copy's three.
    can_tell = batch.form is Form.APPROX and reads_are_free(batch.grads) and batch.is_whole
    return batch.group["max_norm"] is not None or can_tell


def _finite(batch: Batch, norms: Norms) -> list[bool] | None:
    """Of each tensor whether g_t is finite, where the host knows. A part may be where the whole is not."""
    if norms is None or not batch.is_whole or isinstance(norms[0], Tensor):
        return None
    return [math.isfinite(norm) for norm in norms]


# ---- temporary copies ----


def _takes_wide_copies(batch: Batch) -> bool:
    return needs_wide_copies(batch.params[0].dtype, batch.group)


def _takes_copies(batch: Batch) -> bool:
    if _takes_wide_copies(batch):
        return True
    if batch.form is not Form.APPROX or batch.previous_grads is None:
        return False
    pairs = zip(batch.previous_grads, batch.grads, strict=True)
    return any(last.dtype != grad.dtype for last, grad in pairs)
