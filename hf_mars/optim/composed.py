"""One step of MARS (arXiv:2411.10438, Algorithm 1) in the paper's order, composed of torch's kernels.

This is the step that every device, dtype and layout can take, and the one to read. `kernels/` takes it in fewer passes
over memory where it can, with the same results to rounding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

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
from .sharding import Part, norms_of_wholes, on_whole_matrices
from .skipping import Skip

# Elements that are updated at a time where that takes temporary copies of them.
COPIED_AT_A_TIME = 1 << 24

# Elements of matrices, on each rank, that are orthogonalised and applied before the next ones are.
ORTHOGONALISED_AT_A_TIME = 1 << 26

# ‖c_t‖₂ of the tensors of a batch: numbers where the host may look at them, else 0-d tensors; None: not wanted.
Norms = list[float] | list[Tensor] | None


def measure(batches: list[Batch], last_norms: LastNorms, skip: Skip) -> None:
    """Norms of g_t for `skip`, where norms are wanted anyway; see `execution.Execution`."""
    if batches and is_captured(batches[0].grads[0]):
        last_norms.distrust()
    grads: list[Tensor] = []
    parts: list[Part] = []
    for batch in batches:
        if skip.covers(batch.group) or not _wants_norms(batch):
            continue
        # In exact mode c_t is made of two gradients.
        for some in (batch.grads, batch.previous_grads if batch.form is Form.EXACT else None):
            grads += some or []
            parts += batch.parts if some else []
    skip.add(norms_of_wholes(grads, parts))


def step(batches: list[Batch], measured: None, last_norms: LastNorms, skip: Skip) -> None:
    """Update the parameters of `batches` and their states.

    All together, so that the clip's norms take one exchange between ranks per step; those that need temporary copies
    one piece after the other.
    """
    together = [batch for batch in batches if not _takes_copies(batch, skip)]
    pieces = [piece for batch in batches if _takes_copies(batch, skip) for piece in batch.pieces(COPIED_AT_A_TIME)]
    for some in (together, *([piece] for piece in pieces)):
        _step(some, skip)


def _step(batches: list[Batch], skip: Skip) -> None:
    flags = [skip.flag(batch.params[0].device) for batch in batches]
    # c_t = g_t + κ (g_t − g_{t−1})
    corrected = [
        corrected_gradient(
            batch.grads,
            batch.previous_grads,
            kappa=batch.kappa,
            in_place=flag is None or batch.form is not Form.APPROX,  # a skipped step leaves g_{t−1} as it is
        )
        for batch, flag in zip(batches, flags, strict=True)
    ]
    # ‖c_t‖₂
    norms = _norms(batches, corrected)
    for batch, c, norms_of_c, flag in zip(batches, corrected, norms, flags, strict=True):
        # c̃_t = c_t / max(1, ‖c_t‖₂ / max_norm)
        max_norm = batch.group["max_norm"]
        if max_norm is not None and norms_of_c is not None:
            c = _clipped(c, norms_of_c, max_norm, in_place=batch.previous_grads is not None)
        # m_t, v_t and x_{t+1}
        if _takes_wide_copies(batch):
            averages = [batch.exp_avgs, batch.exp_avg_sqs]
            with (
                unchanged_where(flag, [*batch.params, *batch.exp_avgs, *batch.exp_avg_sqs, *batch.compensations]),
                widened(batch.params, averages, batch.compensations) as (wide, wide_averages),
            ):
                _update(batch, wide, [x.to(wide[0].dtype) for x in c], wide_averages[0], wide_averages[1], flag)
        else:
            _update(batch, batch.params, c, batch.exp_avgs, batch.exp_avg_sqs, flag)
        # g_{t−1} ← g_t
        if batch.form is Form.APPROX:
            batch.keep_last_grads([True] * len(c) if _is_finite(batch, skip) else None, flag)


def _update(
    batch: Batch,
    params: list[Tensor],
    c: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    flag: Tensor | None,
) -> None:
    """The preconditioned update of `params`, by AdamW, Lion or Shampoo; none where `flag` is raised."""
    group = batch.group
    beta1, beta2 = group["betas"]
    lr, weight_decay, gamma = batch.lr, batch.weight_decay, batch.momentum_gamma
    if group["update"] == "adamw":
        takes_flag = group["fused"] and not torch.compiler.is_compiling()
        # Without fused kernels torch keeps t on the host, which does not know.
        counts = batch.steps if group["fused"] else []
        with unchanged_where(None if takes_flag else flag, [*params, *exp_avgs, *exp_avg_sqs, *counts]):
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
                flag=flag if takes_flag else None,
            )
        return
    if flag is not None:  # with c̃_t = m_{t−1} an average stays as it is
        c = [torch.where(flag > 0, average, x) for average, x in zip(exp_avgs, c, strict=True)]
    if group["update"] == "lion":
        lion(params, c, exp_avgs, lr=lr, beta1=beta1, weight_decay=weight_decay, gamma=gamma, flag=flag)
    elif group["update"] == "shampoo":
        first = 0
        for piece in batch.pieces(_at_a_time(batch)):
            chosen = slice(first, first := first + len(piece.params))
            shapes = [part.whole_shape(param) for part, param in zip(piece.parts, params[chosen], strict=True)]
            shampoo(
                params[chosen],
                c[chosen],
                exp_avgs[chosen],
                lr=lr,
                beta1=beta1,
                weight_decay=weight_decay,
                gamma=gamma,
                ns_steps=group["ns_steps"],
                layout=group["layout"],
                update_scales=[update_scale(shape, group["layout"], group["adjust_lr_fn"]) for shape in shapes],
                on_wholes=functools.partial(on_whole_matrices, parts=piece.parts, replicas=piece.replicas),
                flag=flag,
            )
    else:
        raise ValueError(f"update must be adamw, lion or shampoo, got {group['update']!r}")


def _at_a_time(batch: Batch) -> int:
    """Enough for each rank to have a stack of matrices to work on, few enough to bound the memory of the results."""
    sharers = 1 if batch.replicas is None or not batch.is_whole else batch.replicas.size()
    return ORTHOGONALISED_AT_A_TIME * sharers


# ---- norms and the clip ----


def _norms(batches: list[Batch], corrected: list[list[Tensor]]) -> list[Norms]:
    """‖c_t‖₂ of whole tensors, batch by batch, with one exchange between ranks."""
    wanted = [batch.group["max_norm"] is not None for batch in batches]
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


def _is_finite(batch: Batch, skip: Skip) -> bool:
    """Whether the host knows that g_t is. A part may be where the whole is not."""
    return batch.is_whole and skip.on_host() is False and (skip.covers(batch.group) or _wants_norms(batch))


# ---- temporary copies ----


def _takes_wide_copies(batch: Batch) -> bool:
    return needs_wide_copies(batch.params[0].dtype, batch.group)


def _takes_copies(batch: Batch, skip: Skip) -> bool:
    if _takes_wide_copies(batch):
        return True
    if batch.form is not Form.APPROX or batch.previous_grads is None:
        return False
    if skip.flag(batch.params[0].device) is not None and batch.group["max_norm"] is None:
        return True
    pairs = zip(batch.previous_grads, batch.grads, strict=True)
    return any(last.dtype != grad.dtype for last, grad in pairs)


@contextlib.contextmanager
def unchanged_where(flag: Tensor | None, tensors: list[Tensor]) -> Iterator[None]:
    """Bring back tensors as they were before, where `flag` is raised: for work that cannot be told not to happen."""
    before = [] if flag is None else [tensor.clone() for tensor in tensors]
    yield
    if flag is not None:
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(torch.where(flag > 0, old, tensor))
