"""Orthogonalisation of matrices: the Newton–Schulz iteration, and the singular value decomposition it approximates."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Quintic coefficients (a, b, c) of X ← aX + b(XXᵀ)X + c(XXᵀ)²X. Source: K. Jordan et al., "Muon: An optimizer for
# hidden layers in neural networks" (2024); MARS-Shampoo (arXiv:2411.10438, Algorithm 4) and MARS-M use the same.
# Their slope at zero is steep on purpose: singular values end in about [0.68, 1.14] instead of exactly at 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """Approximate the orthogonal polar factor U Vᵀ of each matrix = U S Vᵀ.

    Args:
        matrix: shape (…, m, n), a matrix or a stack of them; any floating dtype. Not modified.
        steps: number of iterations.

    Returns:
        A tensor of the same shape, dtype and device. A zero matrix gives zeros.

    Accelerators compute in bfloat16, which the iteration tolerates by design (see `_accelerators_dtype` for those that
    cannot), and so do CPUs with bfloat16 units from MIN_BFLOAT16 rows and columns on, where it is two (AVX512_BF16) to
    six times (AMX) faster. Other CPUs compute in float32. float64 stays float64.
    """
    return orthogonalize([matrix], steps)[0].to(matrix.dtype)


def dtype_of_stack(shape: torch.Size, like: Tensor) -> torch.dtype:
    """What matrices of `shape`, of the dtype and device of `like`, are rounded to before all else: so that they may be
    sent in bfloat16."""
    halves = has_bfloat16(like) and in_bfloat16(shape, like)
    return torch.bfloat16 if halves else torch.promote_types(like.dtype, torch.float32)


def orthogonalize_stack(x: Tensor, steps: int) -> Tensor:
    """`newton_schulz` of a stack of matrices of shape (…, m, n), in batched products: fewer launches, busier cores.

    Args:
        x: shape (k, …, m, n), of `dtype_of_stack`. Overwritten.
        steps: number of iterations.

    Returns:
        A contiguous tensor of the same shape, in the dtype in which the iteration computes.
    """
    if x.shape[-2] > x.shape[-1]:  # the Gram matrix XXᵀ of a wide matrix is smaller than a tall one's
        return orthogonalize_stack(x.mT, steps).mT.contiguous()
    shape, dtype = x.shape, torch.promote_types(x.dtype, torch.float32)
    norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=dtype)
    # Every singular value is at most the Frobenius norm, so this brings them into [0, 1], where the iteration works.
    # Squares of entries below tiny^(1/2) vanish: of 10⁸ of them, or fewer, a norm of up to 10⁴ tiny^(1/2) is lost. So
    # matrices below that norm end smaller, instead of overflowing; zero ones stay zero.
    x.div_(norms.clamp(min=1e4 * torch.finfo(dtype).tiny ** 0.5))
    if _takes_float16(x):  # whose range wants unit norm
        x = x.half()

    x = x.flatten(0, -3)
    pairs = steps // 2 if x.shape[-1] >= WIDE * x.shape[-2] else 0
    for _ in range(pairs):
        x = _two_steps(x)
    for _ in range(steps - 2 * pairs):
        x = _one_step(x)
    return x.view(shape)


def _one_step(x: Tensor) -> Tensor:
    """aX + p(XXᵀ) X, with p(G) = bG + cG²."""
    return torch.baddbmm(x, _polynomial(x @ x.mT), x, beta=COEFFICIENTS[0])


# From this ratio of columns to rows on, two steps at once save work: of five steps 8 % at 2, 17 % at 3, 22 % at 4.
WIDE = 2


def _two_steps(x: Tensor) -> Tensor:
    """The same twice, in the small matrices alone: X″ = (aI + p(G′)) (aI + p(G)) X, G′ = (aI + p(G)) G (aI + p(G)).

    Not more than two: what rounding does to G in directions of small singular values grows by a² each time.
    """
    a = COEFFICIENTS[0]
    gram = x @ x.mT  # G
    first = _polynomial(gram)  # p(G)
    half = torch.baddbmm(gram, first, gram, beta=a)  # (aI + p(G)) G
    second = _polynomial(torch.baddbmm(half, half, first, beta=a))  # p(G′)
    product = torch.baddbmm(first + second, second, first, beta=a)  # a p(G) + a p(G′) + p(G′) p(G)
    return torch.baddbmm(x, product, x, beta=a * a)


def _polynomial(gram: Tensor) -> Tensor:
    """p(G) = bG + cG²."""
    _, b, c = COEFFICIENTS
    return torch.baddbmm(gram, gram, gram, beta=b, alpha=c)


# Elements of a stack. The iteration takes about three times its memory; on CPUs larger ones are slower, too.
STACKED = 1 << 26
STACKED_ON_CPU = 5_000_000

CPU_HAS_BFLOAT16_UNITS = any(
    getattr(torch.cpu, name, bool)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
)
# Below it, products are too small for these units to pay.
MIN_BFLOAT16 = 128


def has_bfloat16(like: Tensor) -> bool:
    """Whether the device of `like` has units for products in bfloat16."""
    return CPU_HAS_BFLOAT16_UNITS if like.is_cpu else _accelerators_dtype(like.device) == torch.bfloat16


def in_bfloat16(shape: torch.Size, like: Tensor) -> bool:
    """Whether matrices of shape (…, m, n) take the iteration in bfloat16 where there are such units.

    `like` has their dtype and device.
    """
    return like.dtype != torch.float64 and (not like.is_cpu or min(shape[-2:]) >= MIN_BFLOAT16)


@functools.cache
def _accelerators_dtype(device: torch.device) -> torch.dtype:
    """What matrix units of `device` multiply with sums in float32.

    NVIDIA's know bfloat16 from compute capability 8.0 on, and float16 alone at 7.x, where bfloat16 is emulated. That
    does as well: entries are at most 1, of unit Frobenius norm, so that in 4,096² of them the root mean square is 4
    times float16's smallest normal number, and three more bits are kept. Metal does not say how it adds float16 up,
    and has no bfloat16 before macOS 14.
    """
    if device.type == "mps":
        return torch.float32
    if device.type == "cuda" and torch.version.hip is None:
        major, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32
    return torch.bfloat16


def _takes_float16(matrix: Tensor) -> bool:
    is_half = not matrix.is_cpu and _accelerators_dtype(matrix.device) == torch.float16
    return is_half and matrix.dtype != torch.float64


def orthogonalize_svd(matrix: Tensor) -> Tensor:
    """The orthogonal polar factor U Vᵀ itself, from a singular value decomposition (slow; for tests, small models).

    Args:
        matrix: shape (…, m, n); any floating dtype (half precisions are decomposed in float32).

    Returns:
        A tensor of the same shape, dtype and device. Directions whose singular value is zero stay zero.
    """
    x = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    floor = s.amax(dim=-1, keepdim=True) * max(x.shape[-2:]) * torch.finfo(x.dtype).eps
    return ((u * (s > floor).unsqueeze(-2)) @ vh).to(matrix.dtype)


def stack_height(shape: torch.Size, device: torch.device) -> int:
    """How many matrices of `shape` are worked on at a time."""
    return max(1, (STACKED_ON_CPU if device.type == "cpu" else STACKED) // max(1, shape.numel()))


def orthogonalize(matrices: list[Tensor], steps: int | None) -> list[Tensor]:
    """Orthogonalise many matrices, those of one shape, or of its transpose, together.

    Args:
        matrices: tensors of shape (…, m, n).
        steps: Newton–Schulz iterations; None takes the singular value decomposition.

    Returns:
        Their (approximate) orthogonal polar factors, in the given order; those of the iteration in the dtype in which
        it computes.
    """
    if steps is None:
        return [orthogonalize_svd(x) for x in matrices]
    stacks: dict[tuple, list[int]] = {}
    # A shape and its transpose together.
    wide = [x.mT if x.shape[-2] > x.shape[-1] else x for x in matrices]
    for i, x in enumerate(wide):
        stacks.setdefault((x.shape, x.dtype, x.device), []).append(i)
    results: dict[int, Tensor] = {}
    for (shape, _, device), indices in stacks.items():
        height = stack_height(shape, device)
        for start in range(0, len(indices), height):
            chosen = indices[start : start + height]
            stack = torch.stack([wide[i] for i in chosen])
            for i, x in zip(chosen, orthogonalize_stack(stack.to(dtype_of_stack(shape, stack)), steps), strict=True):
                results[i] = x if wide[i] is matrices[i] else x.mT
    return [results[i] for i in range(len(matrices))]
