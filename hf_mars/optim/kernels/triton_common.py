"""What the Triton kernels share (triton_norms.py, triton_update.py): many tensors in one launch.

Each program updates BLOCK elements of one tensor; `tensor_of_block` says of which. `table` describes the tensors: it
has a column for each, and a row for each of the names SIZE to COMPENSATION below; one row takes `stride` entries.
Arguments named after a hyperparameter are its float64, see `number`. WIDE is the dtype that everything is computed in;
ALIGNED says whether addresses are multiples of 16. In float32 divisions and square roots are rounded correctly, and
products are not fused with sums (gpu.py's options), as in torch's kernels.
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

# Arguments that change from step to step: no value of theirs is compiled into a kernel.
VARYING = ["stride", "n", "kappa", "beta1", "beta2", "eps", "gamma", "lr", "decay", "max_norm"]


@triton.jit
def number(bits):
    """A float64 from the bits of its negative, as gpu.py passes it."""
    return -bits.to(tl.float64, bitcast=True)


@triton.jit
def sqrt(x, WIDE: tl.constexpr):
    if WIDE == tl.float32:
        root = tl.sqrt_rn(x)
    else:
        root = tl.sqrt(x)
    return root


@triton.jit
def div(x, y, WIDE: tl.constexpr):
    if WIDE == tl.float32:
        quotient = tl.div_rn(x, y)
    else:
        quotient = x / y
    return quotient


@triton.jit
def at(table, row: tl.constexpr, stride, k, start, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the block that begins with element `start` of a tensor lies."""
    pointer = tl.load(table + row * stride + k).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def block_of(table, tensor_of_block, stride, block, BLOCK: tl.constexpr):
    """The tensor of a block, the block's first element, and how many there are from there on, up to BLOCK.

    Places in a tensor are int64, lanes of a block int32: registers for addresses are half as many then.
    """
    k = tl.load(tensor_of_block + block)
    start = (block - tl.load(table + FIRST_BLOCK * stride + k)) * BLOCK
    return k, start, tl.minimum(tl.load(table + SIZE * stride + k) - start, BLOCK).to(tl.int32)


@triton.jit
def load(pointer, lanes, count, MASKED: tl.constexpr, WIDE: tl.constexpr):
    # A mask would keep the compiler from loading several elements at once.
    values = tl.load(pointer + lanes, mask=lanes < count, other=0.0) if MASKED else tl.load(pointer + lanes)
    return values.to(WIDE)


@triton.jit
def load_g(pointer, lanes, count, factor, MASKED: tl.constexpr, WIDE: tl.constexpr, SCALES: tl.constexpr):
    """g_t. SCALES: it is the product of the gradient and the factor of the global clip, rounded to its dtype."""
    g = tl.load(pointer + lanes, mask=lanes < count, other=0.0) if MASKED else tl.load(pointer + lanes)
    if SCALES:
        dtype: tl.constexpr = pointer.dtype.element_ty
        if dtype == tl.float64:
            g = g * tl.load(factor).to(tl.float64)
        else:
            g = (g.to(tl.float32) * tl.load(factor).to(tl.float32)).to(dtype)
    return g.to(WIDE)


@triton.jit
def store(pointer, lanes, count, values, MASKED: tl.constexpr):
    values = values.to(pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer + lanes, values, mask=lanes < count)
    else:
        tl.store(pointer + lanes, values)


@triton.jit
def corrected(kappa, g, prev, WIDE: tl.constexpr):
    """c = g + κ (g − g_prev)"""
    return g + number(kappa).to(WIDE) * (g - prev)


@triton.jit
def lerp(start, end, weight, WIDE: tl.constexpr):
    """From the nearer end, as torch.lerp does it."""
    change = end - start
    return tl.where(weight < 0.5, start + weight.to(WIDE) * change, end - (1 - weight).to(WIDE) * change)
