"""Copies of many tensors at once in Triton, bit for bit; see triton_common.py.

DTYPE is an integer as large as their elements.
"""

import triton
import triton.language as tl

from .triton_common import PREV, VARYING, X, at, block_of, load, store


@triton.jit(do_not_specialize=VARYING)
def swap(table, tensor_of_block, stride, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """What is in rows X and PREV changes places."""
    k, start, count = block_of(table, tensor_of_block, stride, tl.program_id(0), BLOCK)
    lanes = tl.arange(0, BLOCK)
    at_x = at(table, X, stride, k, start, DTYPE, ALIGNED)
    at_prev = at(table, PREV, stride, k, start, DTYPE, ALIGNED)
    if count == BLOCK:
        x = load(at_x, lanes, count, False, DTYPE)
        prev = load(at_prev, lanes, count, False, DTYPE)
        store(at_x, lanes, count, prev, False)
        store(at_prev, lanes, count, x, False)
    else:
        x = load(at_x, lanes, count, True, DTYPE)
        prev = load(at_prev, lanes, count, True, DTYPE)
        store(at_x, lanes, count, prev, True)
        store(at_prev, lanes, count, x, True)


@triton.jit(do_not_specialize=VARYING)
def keep(table, tensor_of_block, stride, flag, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """What is in row X into row PREV, unless the flag is raised."""
    k, start, count = block_of(table, tensor_of_block, stride, tl.program_id(0), BLOCK)
    lanes = tl.arange(0, BLOCK)
    at_x = at(table, X, stride, k, start, DTYPE, ALIGNED)
    at_prev = at(table, PREV, stride, k, start, DTYPE, ALIGNED)
    if tl.load(flag) == 0:
        if count == BLOCK:
            store(at_prev, lanes, count, load(at_x, lanes, count, False, DTYPE), False)
        else:
            store(at_prev, lanes, count, load(at_x, lanes, count, True, DTYPE), True)
