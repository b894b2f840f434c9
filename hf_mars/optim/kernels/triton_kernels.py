"""The Triton kernels of gpu.py: the step of MARS-AdamW and MARS-Lion for many tensors at once.

Each program updates BLOCK elements of one tensor; `tensor_of_block` says of which. `table` describes the tensors: it
has a column for each, and a row for each of the names SIZE to COMPENSATION below; one row takes `stride` entries.
`numbers` are the hyperparameters, in float64, since float arguments of a kernel would be float32. WIDE is the dtype
that everything is computed in.

The equations are those of algorithm/correction.py, adamw.py and lion.py.
"""

import triton
import triton.language as tl

# Rows of the table. A tensor's blocks are FIRST_BLOCK of its own column up to that of the next column.
SIZE: tl.constexpr = tl.constexpr(0)
FIRST_BLOCK: tl.constexpr = tl.constexpr(1)
X: tl.constexpr = tl.constexpr(2)  # from here on, addresses
G: tl.constexpr = tl.constexpr(3)
PREV: tl.constexpr = tl.constexpr(4)  # g_prev: g_{t−1}, or ∇f(x_{t−1}, ξ_t)
M: tl.constexpr = tl.constexpr(5)
V: tl.constexpr = tl.constexpr(6)
STEP: tl.constexpr = tl.constexpr(7)
COMPENSATION: tl.constexpr = tl.constexpr(8)

# Places among the numbers.
KAPPA: tl.constexpr = tl.constexpr(0)
BETA1: tl.constexpr = tl.constexpr(1)
BETA2: tl.constexpr = tl.constexpr(2)
EPS: tl.constexpr = tl.constexpr(3)
GAMMA: tl.constexpr = tl.constexpr(4)
LR: tl.constexpr = tl.constexpr(5)
DECAY: tl.constexpr = tl.constexpr(6)  # 1 − ηλ
MAX_NORM: tl.constexpr = tl.constexpr(7)

# What is known of a tensor's c_t.
SHORT: tl.constexpr = tl.constexpr(0)  # ‖c_t‖ is bounded below max_norm
MEASURED: tl.constexpr = tl.constexpr(1)
TO_MEASURE: tl.constexpr = tl.constexpr(2)


@triton.jit
def _pointer(table, row: tl.constexpr, stride, k, dtype: tl.constexpr):
    return tl.multiple_of(tl.load(table + row * stride + k).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _load(pointer, offsets, size, MASKED: tl.constexpr, WIDE: tl.constexpr):
    # A mask would keep the compiler from loading several elements at once.
    values = tl.load(pointer + offsets, mask=offsets < size, other=0.0) if MASKED else tl.load(pointer + offsets)
    return values.to(WIDE)


@triton.jit
def _store(pointer, offsets, size, values, MASKED: tl.constexpr):
    values = values.to(pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer + offsets, values, mask=offsets < size)
    else:
        tl.store(pointer + offsets, values)


@triton.jit
def _is_short(numbers, norm_of_g, norm_of_prev):
    """‖c‖ ≤ (1+κ)‖g‖ + κ‖g_prev‖, with room for rounding, of g_prev to bfloat16 too. False where a norm is NaN."""
    kappa = tl.load(numbers + KAPPA)
    bound = (1 + kappa) * norm_of_g.to(tl.float64) + kappa * norm_of_prev.to(tl.float64)
    return bound < 0.995 * tl.load(numbers + MAX_NORM)


@triton.jit
def _corrected(numbers, g, prev, WIDE: tl.constexpr):
    """c = g + κ (g − g_prev)"""
    return g + tl.load(numbers + KAPPA).to(WIDE) * (g - prev)


@triton.jit
def _lerp(start, end, weight, WIDE: tl.constexpr):
    """From the nearer end, as torch.lerp does it."""
    change = end - start
    return tl.where(weight < 0.5, start + weight.to(WIDE) * change, end - (1 - weight).to(WIDE) * change)


@triton.jit
def _squares(values):
    """Σ values², in float64 where float32 would overflow: from 1e19 on."""
    total = tl.sum(values * values, axis=0).to(tl.float64)
    if (total < float("inf")) == 0:
        values = values.to(tl.float64)
        total = tl.sum(values * values, axis=0)
    return total


@triton.jit
def _norm(sums, table, stride, k, WIDE: tl.constexpr, REDUCED: tl.constexpr):
    """The root of the sum of a tensor's blocks."""
    at_first = table + FIRST_BLOCK * stride + k
    first, last = tl.load(at_first), tl.load(at_first + 1)
    lanes = tl.zeros((REDUCED,), dtype=tl.float64)
    for start in range(first, last, REDUCED):
        offsets = start + tl.arange(0, REDUCED)
        lanes += tl.load(sums + offsets, mask=offsets < last, other=0.0)
    return tl.sqrt(tl.sum(lanes, axis=0)).to(WIDE)


@triton.jit(do_not_specialize=["stride"])
def measure(
    table,
    numbers,
    tensor_of_block,
    stride,
    prev_norms,
    knowledge,
    sums_of_g,
    sums_of_c,
    WIDE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    PREV_DTYPE: tl.constexpr,
    CORRECTED: tl.constexpr,
    AGAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σ g² of every block; and Σ c² where ‖g_prev‖ is so large that ‖g‖ will hardly bound ‖c‖ below max_norm.

    AGAIN: Σ c² of the tensors of which ‖g‖ turned out too large for that. Without CORRECTED, c is g.
    """
    block = tl.program_id(0)
    k = tl.load(tensor_of_block + block)
    if AGAIN:
        wants_c = tl.load(knowledge + k) == TO_MEASURE
    elif CORRECTED:
        prev_norm = tl.load(prev_norms + k)
        wants_c = _is_short(numbers, prev_norm, prev_norm) == 0
    else:
        wants_c = False
    if wants_c or not AGAIN:
        start = (block - tl.load(table + FIRST_BLOCK * stride + k)) * BLOCK
        offsets = start + tl.arange(0, BLOCK)
        size = tl.load(table + SIZE * stride + k)
        at_g = _pointer(table, G, stride, k, G_DTYPE)
        if start + BLOCK <= size:
            g = _load(at_g, offsets, size, False, WIDE)
        else:
            g = _load(at_g, offsets, size, True, WIDE)
        if not AGAIN:
            tl.store(sums_of_g + block, _squares(g))
        if CORRECTED:
            if wants_c:
                at_prev = _pointer(table, PREV, stride, k, PREV_DTYPE)
                if start + BLOCK <= size:
                    prev = _load(at_prev, offsets, size, False, WIDE)
                else:
                    prev = _load(at_prev, offsets, size, True, WIDE)
                c = _corrected(numbers, g, prev, WIDE)
                tl.store(sums_of_c + block, _squares(c))


@triton.jit(do_not_specialize=["stride"])
def judge(
    table,
    numbers,
    stride,
    prev_norms,
    knowledge,
    sums_of_g,
    norms_of_g,
    WIDE: tl.constexpr,
    REDUCED: tl.constexpr,
):
    """‖g‖ of a tensor, and whether it bounds ‖c‖ below max_norm."""
    k = tl.program_id(0)
    norm_of_g = _norm(sums_of_g, table, stride, k, WIDE, REDUCED)
    tl.store(norms_of_g + k, norm_of_g)
    prev_norm = tl.load(prev_norms + k)
    if _is_short(numbers, prev_norm, prev_norm) == 0:
        tl.store(knowledge + k, MEASURED)
    elif _is_short(numbers, norm_of_g, prev_norm):
        tl.store(knowledge + k, SHORT)
    else:
        tl.store(knowledge + k, TO_MEASURE)


@triton.jit(do_not_specialize=["stride"])
def prepare(
    table,
    numbers,
    stride,
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
    RAISES: tl.constexpr,
    IS_ADAMW: tl.constexpr,
    REDUCED: tl.constexpr,
):
    """A tensor's numbers: the clip's factor, c̃ = factor · c; η/(1−β1^t) and 1/√(1−β2^t) of the coming t.

    RAISES: the flag, where c is not finite. Every program that writes to it writes the same.
    """
    k = tl.program_id(0)
    if CLIPS:
        norm = tl.zeros((), dtype=WIDE)
        if not CORRECTED:
            norm = _norm(sums_of_g, table, stride, k, WIDE, REDUCED)
        elif tl.load(knowledge + k) != SHORT:
            norm = _norm(sums_of_c, table, stride, k, WIDE, REDUCED)
        max_norm = tl.load(numbers + MAX_NORM).to(WIDE)
        tl.store(clip_factors + k, tl.where(norm <= max_norm, 1.0, max_norm / norm))  # NaN stays NaN
        if RAISES:
            if (norm < float("inf")) == 0:
                tl.store(flag, 1.0)
    if IS_ADAMW:
        at_step = _pointer(table, STEP, stride, k, tl.float32)
        t = (tl.load(at_step) + 1).to(tl.float64)
        beta1, beta2 = tl.load(numbers + BETA1), tl.load(numbers + BETA2)
        # β^t; log(0) is −∞, and e to that is 0 again.
        tl.store(step_sizes + k, tl.load(numbers + LR) / (1 - tl.exp(t * tl.log(beta1))))
        tl.store(inverse_root_bias2 + k, 1 / tl.sqrt(1 - tl.exp(t * tl.log(beta2))))


@triton.jit
def _update_block(
    table,
    numbers,
    stride,
    k,
    offsets,
    size,
    clip_factors,
    step_sizes,
    inverse_root_bias2,
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
):
    # All loads before the first store, which the compiler would not move them across.
    at_x = _pointer(table, X, stride, k, X_DTYPE)
    at_m = _pointer(table, M, stride, k, M_DTYPE)
    g = _load(_pointer(table, G, stride, k, G_DTYPE), offsets, size, MASKED, WIDE)
    x = _load(at_x, offsets, size, MASKED, WIDE)
    m = _load(at_m, offsets, size, MASKED, WIDE)
    c = g
    if CORRECTED:
        at_prev = _pointer(table, PREV, stride, k, PREV_DTYPE)
        c = _corrected(numbers, g, _load(at_prev, offsets, size, MASKED, WIDE), WIDE)
    if IS_ADAMW:
        at_v = _pointer(table, V, stride, k, V_DTYPE)
        v = _load(at_v, offsets, size, MASKED, WIDE)
    if COMPENSATED:
        at_compensation = _pointer(table, COMPENSATION, stride, k, X_DTYPE)
        x += _load(at_compensation, offsets, size, MASKED, WIDE)

    if CLIPS:
        c *= tl.load(clip_factors + k)
    if IS_ADAMW == 0:  # sign(NaN) is 0: a NaN in m would stop the element for ever, without a sign of it
        c = tl.where(tl.abs(c) < float("inf"), c, m)
    m = _lerp(m, c, 1 - tl.load(numbers + BETA1), WIDE)
    _store(at_m, offsets, size, m, MASKED)
    if IS_ADAMW:
        beta2 = tl.load(numbers + BETA2)
        v = beta2.to(WIDE) * v + (1 - beta2).to(WIDE) * c * c
        _store(at_v, offsets, size, v, MASKED)
        denominator = tl.sqrt(v) * tl.load(inverse_root_bias2 + k) + tl.load(numbers + EPS).to(WIDE)
        change = tl.load(step_sizes + k) * (m / denominator)
    else:
        gamma = tl.load(numbers + GAMMA)
        m = tl.where(gamma == 0, m, _lerp(m, c, gamma, WIDE))  # an infinite m times zero would be NaN
        change = tl.load(numbers + LR).to(WIDE) * ((m > 0).to(WIDE) - (m < 0).to(WIDE))
    x = tl.load(numbers + DECAY).to(WIDE) * x - change
    _store(at_x, offsets, size, x, MASKED)
    if COMPENSATED:
        _store(at_compensation, offsets, size, x - x.to(X_DTYPE).to(WIDE), MASKED)
    if KEEPS_LAST_GRAD:
        _store(at_prev, offsets, size, tl.where(tl.abs(g) < float("inf"), g, 0.0), MASKED)


@triton.jit(do_not_specialize=["stride"])
def update(
    table,
    numbers,
    tensor_of_block,
    stride,
    clip_factors,
    step_sizes,
    inverse_root_bias2,
    flag,
    norms_of_g,
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
    BLOCK: tl.constexpr,
):
    """c̃, the moving averages, the update, t ← t + 1, and g in the place of g_{t−1}, of every block.

    Where the flag is raised, nothing but: ‖g‖ becomes NaN, since it will not be the norm of g_{t−1}.
    """
    block = tl.program_id(0)
    k = tl.load(tensor_of_block + block)
    start = (block - tl.load(table + FIRST_BLOCK * stride + k)) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    size = tl.load(table + SIZE * stride + k)
    is_skipped = tl.load(flag) != 0
    if start == 0:
        if is_skipped:
            tl.store(norms_of_g + k, float("nan"))
        if IS_ADAMW:
            at_step = _pointer(table, STEP, stride, k, tl.float32)
            tl.store(at_step, tl.load(at_step) + tl.where(is_skipped, 0.0, 1.0))
    size = tl.where(is_skipped, 0, size)  # so that every mask is false
    if start + BLOCK <= size:
        _update_block(
            table, numbers, stride, k, offsets, size, clip_factors, step_sizes, inverse_root_bias2, False, WIDE,
            X_DTYPE, G_DTYPE, PREV_DTYPE, M_DTYPE, V_DTYPE, CORRECTED, KEEPS_LAST_GRAD, CLIPS, IS_ADAMW, COMPENSATED,
        )  # fmt: skip
    else:
        _update_block(
            table, numbers, stride, k, offsets, size, clip_factors, step_sizes, inverse_root_bias2, True, WIDE,
            X_DTYPE, G_DTYPE, PREV_DTYPE, M_DTYPE, V_DTYPE, CORRECTED, KEEPS_LAST_GRAD, CLIPS, IS_ADAMW, COMPENSATED,
        )  # fmt: skip
