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

    Accelerators compute in bfloat16, which the iteration tolerates by design; CPUs compute in the matrix' own dtype,
    half precisions in float32 (their CPU matrix products are slow).
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    # Every singular value is at most the Frobenius norm, so this brings them into [0, 1], where the iteration works.
    # tiny keeps 0/0 away without touching the scale of small matrices.
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    if matrix.device.type != "cpu" and matrix.dtype != torch.float64:
        x = x.bfloat16()

    tall = matrix.size(-2) > matrix.size(-1)
    if tall:  # the Gram matrix XXᵀ is then the smaller of the two
        x = x.mT
    *batch, m, n = x.shape
    x = x.reshape(-1, m, n)
    for _ in range(steps):
        gram = x @ x.mT  # XXᵀ
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b XXᵀ + c (XXᵀ)²
        x = torch.baddbmm(x, polynomial, x, beta=a)  # aX + (b XXᵀ + c (XXᵀ)²) X
    x = x.view(*batch, m, n)
    if tall:
        x = x.mT
    return x.to(matrix.dtype)


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
    for indices in stacks.values():
        # One batched product instead of many small ones: fewer launches, busier cores.
        stack = torch.stack([matrices[i] for i in indices])
        for i, x in zip(indices, newton_schulz(stack, steps).unbind(), strict=True):
            result[i] = x
    return result
