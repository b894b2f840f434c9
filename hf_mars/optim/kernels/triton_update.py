"""The update of MARS-AdamW and MARS-Lion in one pass over memory, in Triton. See triton_common.py.

The equations are those of algorithm/correction.py, adamw.py and lion.py.
"""

import triton
import triton.language as tl

from .triton_common import (
    COMPENSATION,
    PREV,
    STEP,
    VARYING,
    G,
    M,
    V,
    X,
    at,
    block_of,
    corrected,
    div,
    lerp,
    load,
    load_g,
    number,
    sqrt,
    store,
)


@triton.jit
def _update_block(
    table,
    stride,
    k,
    start,
    lanes,
    count,
    kappa,
    beta1,
    beta2,
    eps,
    gamma,
    lr,
    decay,
    clip_factors,
    step_sizes,
    inverse_root_bias2,
    factor,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    X_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    PREV_DTYPE: tl.constexpr,
    M_DTYPE: tl.constexpr,
    V_DTYPE: tl.constexpr,
    CORRECTED: tl.constexpr,
    KEEPS_LAST_GRAD: tl.constexpr,
    CLIPS: tl.constexpr,
    IS_ADAMW: tl.constexpr,
    COMPENSATED: tl.constexpr,
    SCALES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    # All loads before the first store, which the compiler would not move them across.
    at_x = at(table, X, stride, k, start, X_DTYPE, ALIGNED)
    at_m = at(table, M, stride, k, start, M_DTYPE, ALIGNED)
    g = load_g(at(table, G, stride, k, start, G_DTYPE, ALIGNED), lanes, count, factor, MASKED, WIDE, SCALES)
    x = load(at_x, lanes, count, MASKED, WIDE)
    m = load(at_m, lanes, count, MASKED, WIDE)
    c = g
    if CORRECTED:
        at_prev = at(table, PREV, stride, k, start, PREV_DTYPE, ALIGNED)
        c = corrected(kappa, g, load(at_prev, lanes, count, MASKED, WIDE), WIDE)
    if IS_ADAMW:
        at_v = at(table, V, stride, k, start, V_DTYPE, ALIGNED)
        v = load(at_v, lanes, count, MASKED, WIDE)
    if COMPENSATED:
        at_compensation = at(table, COMPENSATION, stride, k, start, X_DTYPE, ALIGNED)
        x += load(at_compensation, lanes, count, MASKED, WIDE)

    if CLIPS:
        c *= tl.load(clip_factors + k)
    if IS_ADAMW == 0:  # sign(NaN) is 0: a NaN in m would stop the element for ever, without a sign of it
        c = tl.where(tl.abs(c) < float("inf"), c, m)
    m = lerp(m, c, 1 - number(beta1), WIDE)
    store(at_m, lanes, count, m, MASKED)
    if IS_ADAMW:
        v = number(beta2).to(WIDE) * v + (1 - number(beta2)).to(WIDE) * c * c
        store(at_v, lanes, count, v, MASKED)
        denominator = sqrt(v, WIDE) * tl.load(inverse_root_bias2 + k) + number(eps).to(WIDE)
        change = tl.load(step_sizes + k) * div(m, denominator, WIDE)
    else:
        # an infinite m times zero would be NaN
        m = tl.where(number(gamma) == 0, m, lerp(m, c, number(gamma), WIDE))
        change = number(lr).to(WIDE) * ((m > 0).to(WIDE) - (m < 0).to(WIDE))
    x = number(decay).to(WIDE) * x - change
    store(at_x, lanes, count, x, MASKED)
    if COMPENSATED:
        store(at_compensation, lanes, count, x - x.to(X_DTYPE).to(WIDE), MASKED)
    if KEEPS_LAST_GRAD:
        store(at_prev, lanes, count, tl.where(tl.abs(g) < float("inf"), g, 0.0), MASKED)


@triton.jit(do_not_specialize=VARYING)
def update(
    table,
    tensor_of_block,
    stride,
    kappa,
    beta1,
    beta2,
    eps,
    gamma,
    lr,
    decay,
    clip_factors,
    step_sizes,
    inverse_root_bias2,
    flag,
    norms_of_g,
    factor,
    WIDE: tl.constexpr,
    X_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    PREV_DTYPE: tl.constexpr,
    M_DTYPE: tl.constexpr,
    V_DTYPE: tl.constexpr,
    CORRECTED: tl.constexpr,
    KEEPS_LAST_GRAD: tl.constexpr,
    CLIPS: tl.constexpr,
    IS_ADAMW: tl.constexpr,
    COMPENSATED: tl.constexpr,
    SCALES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """c̃, the moving averages, the update, t ← t + 1, and g_t in the place of g_{t−1}, of every block.

    Where the flag is raised, nothing but: ‖g‖ becomes NaN, since it will not be the norm of g_{t−1}.
    """
    k, start, count = block_of(table, tensor_of_block, stride, tl.program_id(0), BLOCK)
    lanes = tl.arange(0, BLOCK)
    is_skipped = tl.load(flag) != 0
    if start == 0:
        if is_skipped:
            tl.store(norms_of_g + k, float("nan"))
        if IS_ADAMW:
            at_step = at(table, STEP, stride, k, 0, tl.float32, False)
            tl.store(at_step, tl.load(at_step) + tl.where(is_skipped, 0.0, 1.0))
    count = tl.where(is_skipped, 0, count)  # so that every mask is false
    if count == BLOCK:
        _update_block(
            table, stride, k, start, lanes, count, kappa, beta1, beta2, eps, gamma, lr, decay,
            clip_factors, step_sizes, inverse_root_bias2, factor, False, WIDE, X_DTYPE, G_DTYPE, PREV_DTYPE, M_DTYPE,
            V_DTYPE, CORRECTED, KEEPS_LAST_GRAD, CLIPS, IS_ADAMW, COMPENSATED, SCALES, ALIGNED,
        )  # fmt: skip
    else:
        _update_block(
            table, stride, k, start, lanes, count, kappa, beta1, beta2, eps, gamma, lr, decay,
            clip_factors, step_sizes, inverse_root_bias2, factor, True, WIDE, X_DTYPE, G_DTYPE, PREV_DTYPE, M_DTYPE,
            V_DTYPE, CORRECTED, KEEPS_LAST_GRAD, CLIPS, IS_ADAMW, COMPENSATED, SCALES, ALIGNED,
        )  # fmt: skip
