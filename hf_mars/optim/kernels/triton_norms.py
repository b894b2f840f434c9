"""What the clip needs, and the numbers of a tensor that its update needs, in Triton; see triton_common.py."""

import triton
import triton.language as tl

from .triton_common import (
    FIRST_BLOCK,
    PREV,
    SIZE,
    STEP,
    VARYING,
    G,
    X,
    at,
    block_of,
    corrected,
    div,
    load,
    load_g,
    number,
    store,
)

# What is known of a tensor's c_t.
SHORT: tl.constexpr = tl.constexpr(0)  # ‖c_t‖ is bounded below max_norm
MEASURED: tl.constexpr = tl.constexpr(1)
TO_MEASURE: tl.constexpr = tl.constexpr(2)


@triton.jit
def _is_short(kappa, max_norm, norm_of_g, norm_of_prev):
    """‖c‖ ≤ (1+κ)‖g‖ + κ‖g_prev‖, with room for rounding, of g_prev to bfloat16 too. False where a norm is NaN."""
    k = number(kappa)
    return (1 + k) * norm_of_g.to(tl.float64) + k * norm_of_prev.to(tl.float64) < 0.995 * number(max_norm)


@triton.jit
def _squares(values):
    """Σ values², in float64 where float32 would overflow: from 1e19 on."""
    total = tl.sum(values * values, axis=0).to(tl.float64)
    if (total < float("inf")) == 0:
        wide = values.to(tl.float64)  # another name: a variable keeps its type
        total = tl.sum(wide * wide, axis=0)
    return total


@triton.jit
def _sum_of_blocks(sums, table, stride, k, REDUCED: tl.constexpr):
    at_first = table + FIRST_BLOCK * stride + k
    first, last = tl.load(at_first), tl.load(at_first + 1)
    lanes = tl.zeros((REDUCED,), dtype=tl.float64)
    for start in range(first, last, REDUCED):
        offsets = start + tl.arange(0, REDUCED)
        lanes += tl.load(sums + offsets, mask=offsets < last, other=0.0)
    return tl.sum(lanes, axis=0)


@triton.jit
def _norm_of_blocks(sums, table, stride, k, WIDE: tl.constexpr, REDUCED: tl.constexpr):
    """The root of the sum of a tensor's blocks."""
    return tl.sqrt(_sum_of_blocks(sums, table, stride, k, REDUCED)).to(WIDE)


@triton.jit
def _load_block(at, lanes, count, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    if count == BLOCK:
        values = load(at, lanes, count, False, WIDE)
    else:
        values = load(at, lanes, count, True, WIDE)
    return values


@triton.jit
def _load_g_block(at, lanes, count, factor, WIDE: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr):
    if count == BLOCK:
        values = load_g(at, lanes, count, factor, False, WIDE, SCALES)
    else:
        values = load_g(at, lanes, count, factor, True, WIDE, SCALES)
    return values


@triton.jit(do_not_specialize=VARYING)
def measure(
    table,
    tensor_of_block,
    stride,
    kappa,
    max_norm,
    prev_norms,
    sums_of_g,
    sums_of_c,
    factor,
    WIDE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    PREV_DTYPE: tl.constexpr,
    CORRECTED: tl.constexpr,
    SCALES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σ g² of every block; and Σ c² where ‖g_prev‖ is so large that ‖g‖ will hardly bound ‖c‖ below max_norm.

    Without CORRECTED, c is g.
    """
    block = tl.program_id(0)
    k, start, count = block_of(table, tensor_of_block, stride, block, BLOCK)
    lanes = tl.arange(0, BLOCK)
    g = _load_g_block(at(table, G, stride, k, start, G_DTYPE, ALIGNED), lanes, count, factor, WIDE, SCALES, BLOCK)
    tl.store(sums_of_g + block, _squares(g))
    if CORRECTED:
        prev_norm = tl.load(prev_norms + k)
        if _is_short(kappa, max_norm, prev_norm, prev_norm) == 0:
            at_prev = at(table, PREV, stride, k, start, PREV_DTYPE, ALIGNED)
            c = corrected(kappa, g, _load_block(at_prev, lanes, count, WIDE, BLOCK), WIDE)
            tl.store(sums_of_c + block, _squares(c))


@triton.jit(do_not_specialize=VARYING)
def judge(
    table,
    stride,
    kappa,
    max_norm,
    prev_norms,
    knowledge,
    sums_of_g,
    norms_of_g,
    WIDE: tl.constexpr,
    REDUCED: tl.constexpr,
):
    """‖g‖ of a tensor, and whether it bounds ‖c‖ below max_norm."""
    k = tl.program_id(0)
    norm_of_g = _norm_of_blocks(sums_of_g, table, stride, k, WIDE, REDUCED)
    tl.store(norms_of_g + k, norm_of_g)
    prev_norm = tl.load(prev_norms + k)
    if _is_short(kappa, max_norm, prev_norm, prev_norm) == 0:
        tl.store(knowledge + k, MEASURED)
    elif _is_short(kappa, max_norm, norm_of_g, prev_norm):
        tl.store(knowledge + k, SHORT)
    else:
        tl.store(knowledge + k, TO_MEASURE)


@triton.jit(do_not_specialize=VARYING)
def measure_rest(
    table,
    stride,
    n,
    kappa,
    knowledge,
    sums_of_c,
    factor,
    WIDE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    PREV_DTYPE: tl.constexpr,
    SCALES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    REDUCED: tl.constexpr,
):
    """Σ c² of every block of the tensors of which ‖g‖ turned out too large.

    Mostly there is none, and a few programs see that at a glance; they share the blocks where there is one.
    """
    found = tl.zeros((REDUCED,), dtype=tl.int32)
    for start in range(0, n, REDUCED):
        tensors = start + tl.arange(0, REDUCED)
        found = tl.maximum(found, tl.load(knowledge + tensors, mask=tensors < n, other=SHORT))
    if tl.max(found, axis=0) == TO_MEASURE:
        lanes = tl.arange(0, BLOCK)
        for k in range(0, n):
            if tl.load(knowledge + k) == TO_MEASURE:
                at_first = table + FIRST_BLOCK * stride + k
                first, last = tl.load(at_first), tl.load(at_first + 1)
                for block in range(first + tl.program_id(0), last, tl.num_programs(0)):
                    start_of_block = (block - first) * BLOCK
                    count = tl.minimum(tl.load(table + SIZE * stride + k) - start_of_block, BLOCK).to(tl.int32)
                    at_g = at(table, G, stride, k, start_of_block, G_DTYPE, ALIGNED)
                    at_prev = at(table, PREV, stride, k, start_of_block, PREV_DTYPE, ALIGNED)
                    g = _load_g_block(at_g, lanes, count, factor, WIDE, SCALES, BLOCK)
                    c = corrected(kappa, g, _load_block(at_prev, lanes, count, WIDE, BLOCK), WIDE)
                    tl.store(sums_of_c + block, _squares(c))


@triton.jit(do_not_specialize=VARYING)
def add_blocks(table, stride, sums, totals, REDUCED: tl.constexpr):
    """The sum of a tensor's blocks: of a part of a tensor, which is added up over ranks then."""
    k = tl.program_id(0)
    tl.store(totals + k, _sum_of_blocks(sums, table, stride, k, REDUCED))


@triton.jit(do_not_specialize=VARYING)
def prepare(
    table,
    stride,
    beta1,
    beta2,
    lr,
    max_norm,
    knowledge,
    sums_of_g,
    sums_of_c,
    clip_factors,
    step_sizes,
    inverse_root_bias2,
    flag,
    WIDE: tl.constexpr,
    CORRECTED: tl.constexpr,
    CLIPS: tl.constexpr,
    SPREAD: tl.constexpr,
    RAISES: tl.constexpr,
    IS_ADAMW: tl.constexpr,
    REDUCED: tl.constexpr,
):
    """A tensor's numbers: the clip's factor, c̃ = factor · c; η/(1−β1^t) and 1/√(1−β2^t) of the coming t.

    SPREAD: over ranks, and sums_of_c has Σ c² of every whole tensor, not of blocks.
    RAISES: the flag, where c is not finite. Every program that writes to it writes the same.
    """
    k = tl.program_id(0)
    if CLIPS:
        norm = tl.zeros((), dtype=WIDE)
        if SPREAD:
            norm = tl.sqrt(tl.load(sums_of_c + k)).to(WIDE)
        elif not CORRECTED:
            norm = _norm_of_blocks(sums_of_g, table, stride, k, WIDE, REDUCED)
        elif tl.load(knowledge + k) != SHORT:
            norm = _norm_of_blocks(sums_of_c, table, stride, k, WIDE, REDUCED)
        largest = number(max_norm).to(WIDE)
        tl.store(clip_factors + k, tl.where(norm <= largest, 1.0, div(largest, norm, WIDE)))  # NaN stays NaN
        if RAISES:
            if (norm < float("inf")) == 0:
                tl.store(flag, 1.0)
    if IS_ADAMW:
        at_step = at(table, STEP, stride, k, 0, tl.float32, False)
        t = (tl.load(at_step) + 1).to(tl.float64)
        # β^t; log(0) is −∞, and e to that is 0 again.
        tl.store(step_sizes + k, number(lr) / (1 - tl.exp(t * tl.log(number(beta1)))))
        tl.store(inverse_root_bias2 + k, 1 / tl.sqrt(1 - tl.exp(t * tl.log(number(beta2)))))


@triton.jit(do_not_specialize=VARYING)
def divide(
    table,
    tensor_of_block,
    stride,
    divisors,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Divide every tensor of row X by a number of its own, where that is not 1."""
    k, start, count = block_of(table, tensor_of_block, stride, tl.program_id(0), BLOCK)
    divisor = tl.load(divisors + k)
    if divisor != 1:
        lanes = tl.arange(0, BLOCK)
        at_x = at(table, X, stride, k, start, DTYPE, ALIGNED)
        store(at_x, lanes, count, div(load(at_x, lanes, count, True, WIDE), divisor, WIDE), True)
