"""The momentum of matrices, written where it is orthogonalised, and the update by the result, in Triton.

See triton_common.py. Both passes are over tensors FIRST_TENSOR… of a table, which have one size, and are one stack: of
momenta that are rounded to what the stack is in, or of updates.
"""

import triton
import triton.language as tl

from .triton_common import (
    COMPENSATION,
    PREV,
    VARYING,
    G,
    M,
    X,
    at,
    block_of,
    corrected,
    lerp,
    load,
    load_g,
    number,
    store,
)


@triton.jit
def _in_stack(stack, k, first_tensor, size, start, ALIGNED: tl.constexpr):
    pointer = stack + (k - first_tensor).to(tl.int64) * size + start
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _momentum_block(
    table,
    stride,
    k,
    start,
    lanes,
    count,
    written,
    kappa,
    beta1,
    gamma,
    clip_factors,
    factor,
    at_stack,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    PREV_DTYPE: tl.constexpr,
    M_DTYPE: tl.constexpr,
    CORRECTED: tl.constexpr,
    KEEPS_LAST_GRAD: tl.constexpr,
    CLIPS: tl.constexpr,
    SCALES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    at_m = at(table, M, stride, k, start, M_DTYPE, ALIGNED)
    g = load_g(at(table, G, stride, k, start, G_DTYPE, ALIGNED), lanes, count, factor, MASKED, WIDE, SCALES)
    m = load(at_m, lanes, count, MASKED, WIDE)
    c = g
    if CORRECTED:
        at_prev = at(table, PREV, stride, k, start, PREV_DTYPE, ALIGNED)
        c = corrected(kappa, g, load(at_prev, lanes, count, MASKED, WIDE), WIDE)
    if CLIPS:
        c *= tl.load(clip_factors + k)
    m = lerp(m, c, 1 - number(beta1), WIDE)
    store(at_m, lanes, written, m, MASKED)
    store(at_stack, lanes, count, tl.where(number(gamma) == 0, m, lerp(m, c, number(gamma), WIDE)), MASKED)
    if KEEPS_LAST_GRAD:
        store(at_prev, lanes, written, tl.where(tl.abs(g) < float("inf"), g, 0.0), MASKED)


@triton.jit(do_not_specialize=[*VARYING, "first_block", "first_tensor"])
def momentum(
    table,
    tensor_of_block,
    stride,
    first_block,
    first_tensor,
    size,
    kappa,
    beta1,
    gamma,
    clip_factors,
    flag,
    norms_of_g,
    factor,
    stack,
    WIDE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    PREV_DTYPE: tl.constexpr,
    M_DTYPE: tl.constexpr,
    CORRECTED: tl.constexpr,
    KEEPS_LAST_GRAD: tl.constexpr,
    CLIPS: tl.constexpr,
    SCALES: tl.constexpr,
    ALIGNED: tl.constexpr,
    STACK_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """m ← β1 m + (1−β1) c̃, and g in the place of g_{t−1}, of every block; m, or (1−γ) m + γ c̃, into the stack.

    Where the flag is raised, nothing but the stack is written, and ‖g‖ becomes NaN, since it will not be the norm of
    g_{t−1}.
    """
    k, start, count = block_of(table, tensor_of_block, stride, first_block + tl.program_id(0), BLOCK)
    lanes = tl.arange(0, BLOCK)
    is_skipped = tl.load(flag) != 0
    if start == 0:
        if is_skipped:
            tl.store(norms_of_g + k, float("nan"))
    written = tl.where(is_skipped, 0, count)
    at_stack = _in_stack(stack, k, first_tensor, size, start, STACK_ALIGNED)
    if written == BLOCK:
        _momentum_block(
            table, stride, k, start, lanes, count, written, kappa, beta1, gamma, clip_factors, factor, at_stack,
            False, WIDE, G_DTYPE, PREV_DTYPE, M_DTYPE, CORRECTED, KEEPS_LAST_GRAD, CLIPS, SCALES, ALIGNED,
        )  # fmt: skip
    else:
        _momentum_block(
            table, stride, k, start, lanes, count, written, kappa, beta1, gamma, clip_factors, factor, at_stack,
            True, WIDE, G_DTYPE, PREV_DTYPE, M_DTYPE, CORRECTED, KEEPS_LAST_GRAD, CLIPS, SCALES, ALIGNED,
        )  # fmt: skip


@triton.jit
def _move_block(
    table,
    stride,
    k,
    start,
    lanes,
    count,
    rate,
    decay,
    at_stack,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    X_DTYPE: tl.constexpr,
    COMPENSATED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    at_x = at(table, X, stride, k, start, X_DTYPE, ALIGNED)
    x = load(at_x, lanes, count, MASKED, WIDE)
    update = load(at_stack, lanes, count, MASKED, WIDE)
    if COMPENSATED:
        at_compensation = at(table, COMPENSATION, stride, k, start, X_DTYPE, ALIGNED)
        x += load(at_compensation, lanes, count, MASKED, WIDE)
    x = number(decay).to(WIDE) * x - number(rate).to(WIDE) * update
    store(at_x, lanes, count, x, MASKED)
    if COMPENSATED:
        store(at_compensation, lanes, count, x - x.to(X_DTYPE).to(WIDE), MASKED)


@triton.jit(do_not_specialize=[*VARYING, "first_block", "first_tensor", "rate"])
def move(
    table,
    tensor_of_block,
    stride,
    first_block,
    first_tensor,
    size,
    rate,
    decay,
    flag,
    stack,
    WIDE: tl.constexpr,
    X_DTYPE: tl.constexpr,
    COMPENSATED: tl.constexpr,
    ALIGNED: tl.constexpr,
    STACK_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x ← decay · x − rate · update of every block; nothing where the flag is raised."""
    k, start, count = block_of(table, tensor_of_block, stride, first_block + tl.program_id(0), BLOCK)
    lanes = tl.arange(0, BLOCK)
    count = tl.where(tl.load(flag) != 0, 0, count)
    at_stack = _in_stack(stack, k, first_tensor, size, start, STACK_ALIGNED)
    if count == BLOCK:
        _move_block(
            table, stride, k, start, lanes, count, rate, decay, at_stack,
            False, WIDE, X_DTYPE, COMPENSATED, ALIGNED,
        )  # fmt: skip
    else:
        _move_block(
            table, stride, k, start, lanes, count, rate, decay, at_stack,
            True, WIDE, X_DTYPE, COMPENSATED, ALIGNED,
        )  # fmt: skip
