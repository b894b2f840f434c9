"""One step of MARS (arXiv:2411.10438, Algorithm 1) in the paper's order, composed of torch's kernels.

This is the step that every device, dtype and layout can take, and the one to read. `kernels/` takes it in fewer passes
over memory where it can, with the same results to rounding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

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
from .skipping import Skip

# Elements that are updated at a time where that takes temporary copies of them.
COPIED_AT_A_TIME = 1 << 24

# Elements of matrices, on each rank, that are orthogonalised and applied before the next ones are. Ranks with equal
# gradients, which each keep the results of all, share those of so many ranks at most.
ORTHOGONALISED_AT_A_TIME = 1 << 26
SHARERS_AT_A_TIME = 8

# ‖c_t‖₂ of the tensors of a batch: numbers where the host may look at them, else 0-d tensors; None: not wanted.
Norms = list[float] | list[Tensor] | None


class Corrected(NamedTuple):
    """c_t of the tensors of a batch, and ‖c_t‖₂."""

    c: list[Tensor]
    norms: Norms


def measure(batches: list[Batch], last_norms: LastNorms, skip: Skip) -> list[Corrected | None]:
    """Norms by which the step is skipped, where norms are wanted anyway; see `execution.Execution`.

    Those of c_t, which is then kept for `step`, where it needs no memory or another exchange between ranks would be
    needed; else those of g_t, for c_t will take the memory of g_{t−1}.
    """
    if batches and is_captured(batches[0].grads[0]):
        last_norms.distrust()
    wanted = [_wants_norms(batch) and not skip.covers(batch.group) for batch in batches]
    early = [wants and _is_corrected_early(batch) for batch, wants in zip(batches, wanted, strict=True)]
    chosen = [batch for batch, is_early in zip(batches, early, strict=True) if is_early]
    found = iter(_corrected(chosen, in_place=False))
    results = [next(found) if is_early else None for is_early in early]
    for result in results:
        skip.add((result and result.norms) or [])
    others = [b for b, wants, is_early in zip(batches, wanted, early, strict=True) if wants and not is_early]
    grads = [grad for batch in others for grad in batch.grads]
    parts = [part for batch in others for part in batch.parts]
    for batch in others:
        if batch.form is Form.EXACT and batch.previous_grads:  # c_t is made of two gradients
            grads += batch.previous_grads
            parts += batch.parts
    skip.add(norms_of_wholes(grads, parts))
    return results


def step(batches: list[Batch], measured: list[Corrected | None], last_norms: LastNorms, skip: Skip) -> None:
    """Update the parameters of `batches` and their states.

    All together, so that the clip's norms take one exchange between ranks per step; those that need temporary copies
    one piece after the other.
    """
    for batch, known in zip(batches, measured, strict=True):
        if known is not None:
            _update_by(batch, known, skip)
    others = [batch for batch, known in zip(batches, measured, strict=True) if known is None]
    together = [batch for batch in others if not _takes_copies(batch, skip)]
    pieces = [piece for batch in others if _takes_copies(batch, skip) for piece in batch.pieces(COPIED_AT_A_TIME)]
    for some in (together, *([piece] for piece in pieces)):
        # A skipped step leaves g_{t−1} as it is.
        in_place = all(skip.flag(batch.params[0].device) is None for batch in some)
        for batch, corrected in zip(some, _corrected(some, in_place=in_place), strict=True):
            _update_by(batch, corrected, skip)


def _corrected(batches: list[Batch], *, in_place: bool) -> list[Corrected]:
    # c_t = g_t + κ (g_t − g_{t−1})
    corrected = [
        corrected_gradient(
            batch.grads,
            batch.previous_grads,
            kappa=batch.kappa,
            in_place=in_place or batch.form is not Form.APPROX,
        )
        for batch in batches
    ]
    # ‖c_t‖₂
    return list(map(Corrected, corrected, _norms(batches, corrected)))


def _update_by(batch: Batch, corrected: Corrected, skip: Skip) -> None:
    c, norms = corrected
    flag = skip.flag(batch.params[0].device)
    # c̃_t = c_t / max(1, ‖c_t‖₂ / max_norm)
    max_norm = batch.group["max_norm"]
    if max_norm is not None and norms is not None:
        c = _clipped(c, norms, max_norm, in_place=batch.previous_grads is not None)
    # m_t, v_t and x_{t+1}
    if _takes_wide_copies(batch):
        averages = [batch.exp_avgs, batch.exp_avg_sqs]
        with (
            unchanged_where(flag, [*batch.params, *batch.exp_avgs, *batch.exp_avg_sqs, *batch.compensations]),
            widened(batch.params, averages, batch.compensations) as (wide, (exp_avgs, exp_avg_sqs)),
        ):
            _update(batch, wide, [x.to(wide[0].dtype) for x in c], exp_avgs, exp_avg_sqs, flag)
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
    return ORTHOGONALISED_AT_A_TIME * min(sharers, SHARERS_AT_A_TIME)


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
    if norms is None or not isinstance(norms[0], Tensor) or not gpu.takes(c):
        return clipped(c, norms or [], max_norm, in_place=in_place)
    c = c if in_place else list(torch._foreach_mul(c, 1.0))
    gpu.divide(c, (torch.stack(norms) / max_norm).clamp_(min=1.0))
    return c


def _is_corrected_early(batch: Batch) -> bool:
    """Whether c_t is made before it is known whether the step is skipped: for the clip, and not over g_{t−1}."""
    if batch.group["max_norm"] is None or _takes_wide_copies(batch) or _has_other_last_grads(batch):
        return False
    # On CPUs fresh memory for c_t costs more than another look at g_t.
    return batch.form is not Form.APPROX or not batch.is_whole or not reads_are_free(batch.grads)


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
    if _takes_wide_copies(batch) or _has_other_last_grads(batch):
        return True
    # c_t beside g_{t−1}
    is_flagged = skip.flag(batch.params[0].device) is not None
    return is_flagged and batch.form is Form.APPROX and batch.group["max_norm"] is None


def _has_other_last_grads(batch: Batch) -> bool:
    """Whether g_{t−1} is kept in another dtype."""
    if batch.form is not Form.APPROX or batch.previous_grads is None:
        return False
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
