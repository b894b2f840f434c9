"""Orthogonalisation of matrices: the Newton–Schulz iteration, and the singular value decomposition it approximates."""

from __future__ import annotations

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
        steps: number of iterations; each costs three matrix products.

    Returns:
        A tensor of the same shape, dtype and device. A zero matrix gives zeros.

    Accelerators compute in bfloat16, which the iteration tolerates by design, and so do CPUs with matrix units (AMX)
    from MIN_BFLOAT16 rows and columns on, where it is three to six times faster. Other CPUs compute in float32.
    float64 stays float64.
    """
    return _newton_schulz_of_a_stack([matrix], steps)[0]


def _newton_schulz_of_a_stack(matrices: list[Tensor], steps: int) -> list[Tensor]:
    """The same for tensors of one shape, dtype and device, in batched products: fewer launches, busier cores."""
    *batch, m, n = matrices[0].shape
    tall = m > n
    if tall:  # the Gram matrix XXᵀ is then the smaller of the two
        matrices = [x.mT for x in matrices]
    dtype = torch.promote_types(matrices[0].dtype, torch.float32)
    norms = torch.stack([torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=dtype) for x in matrices])
    x = matrices[0].new_empty(
        (len(matrices), *matrices[0].shape), dtype=torch.bfloat16 if _takes_bfloat16(matrices[0]) else dtype
    )
    for place, matrix in zip(x, matrices, strict=True):
        place.copy_(matrix)
    # Every singular value is at most the Frobenius norm, so this brings them into [0, 1], where the iteration works.
    # tiny keeps 0/0 away without touching the scale of small matrices.
    x.div_(norms.clamp(min=torch.finfo(dtype).tiny))

    a, b, c = COEFFICIENTS
    x = x.view(-1, *x.shape[-2:])
    for _ in range(steps):
        gram = x @ x.mT  # XXᵀ
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b XXᵀ + c (XXᵀ)²
        x = torch.baddbmm(x, polynomial, x, beta=a)  # aX + (b XXᵀ + c (XXᵀ)²) X
    x = x.view(len(matrices), *batch, *x.shape[-2:])
    return [(y.mT if tall else y).to(matrices[0].dtype) for y in x.unbind()]


# Elements of a stack. The iteration takes about three times its memory; on CPUs larger ones are slower, too.
STACKED = 1 << 26
STACKED_ON_CPU = 5_000_000

# Below it, products are too small for the matrix units to pay.
MIN_BFLOAT16 = 128


def _takes_bfloat16(matrix: Tensor) -> bool:
    if matrix.dtype == torch.float64:
        return False
    return not matrix.is_cpu or (min(matrix.shape[-2:]) >= MIN_BFLOAT16 and torch.cpu._is_amx_tile_supported())


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


def orthogonalize(matrices: list[Tensor], steps: int | None) -> list[Tensor]:
    """Orthogonalise many matrices, those of one shape together.

    Args:
        matrices: tensors of shape (…, m, n).
        steps: Newton–Schulz iterations; None takes the singular value decomposition.

    Returns:
        Their (approximate) orthogonal polar factors, in the given order.
    """
    if steps is None:
        return [orthogonalize_svd(x) for x in matrices]
    stacks: dict[tuple, list[int]] = {}
    for i, x in enumerate(matrices):
        stacks.setdefault((x.shape, x.dtype, x.device), []).append(i)
    result: list[Tensor] = [None] * len(matrices)
    for (shape, _, device), indices in stacks.items():
        height = max(1, (STACKED_ON_CPU if device.type == "cpu" else STACKED) // max(1, shape.numel()))
        for start in range(0, len(indices), height):
            chosen = indices[start : start + height]
            stack = [matrices[i] for i in chosen]
            for i, x in zip(chosen, _newton_schulz_of_a_stack(stack, steps), strict=True):
                result[i] = x
    return result
