"""MARS-Shampoo on GPUs: a kernel writes the momenta of matrices of one shape where they are orthogonalised,
another moves x by the result; one stack of matrices after the other, so that no more than one is held.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..algorithm.newton_schulz import dtype_of_stack, orthogonalize_stack, stack_height
from ..algorithm.shampoo import as_matrix, update_scale
from ..last_grad import LastNorms
from .launch import Launch, bits
from .plan import ALIGNMENT


class Run(NamedTuple):
    """Tensors of a table that are orthogonalised together: those from the place `first` on."""

    first: int
    matrices: int
    shape: torch.Size  # of the parameters
    matrix: torch.Size  # of what is orthogonalised: (…, m, n)


class MatrixLaunch(Launch):
    """The launches of one step for batches of matrices with equal settings."""

    def update(self, flag: Tensor | None, last_norms: LastNorms) -> None:
        """m_t, x_{t+1} and g_{t−1} of all tensors, unless `flag` is raised."""
        for run in self.runs():
            stack = self.momentum(run, flag)
            self.move(run, orthogonalize_stack(stack, self.group["ns_steps"]), flag)
        self.finish(last_norms)

    def runs(self) -> list[Run]:
        """Tensors of one shape lie next to each other in the table."""
        if self.operands.runs is None:
            shapes = [batch.params[i].shape for batch, i in self.places]
            self.operands.runs = []
            for shape, places in itertools.groupby(range(len(shapes)), key=shapes.__getitem__):
                matrix = as_matrix(torch.empty(shape, device="meta"), self.group["layout"]).shape
                first, *others = places
                end = first + 1 + len(others)
                height = stack_height(matrix, self.device)
                if matrix.numel():
                    some = [Run(k, min(height, end - k), shape, matrix) for k in range(first, end, height)]
                    self.operands.runs += some
        return self.operands.runs

    def momentum(self, run: Run, flag: Tensor | None) -> Tensor:
        """c̃_t, m_t, and g_t in the place of g_{t−1}. Returns m_t for Newton–Schulz: (matrices, …, m, n)."""
        operands = self.operands
        wide = operands.norms_of_g  # has the dtype that is computed in
        dtype = dtype_of_stack(run.matrix, wide)
        stack = torch.empty((run.matrices, *run.matrix), dtype=dtype, device=self.device)
        kappa, beta1, _, _, gamma, _, _ = self.numbers
        names = ("G_DTYPE", "PREV_DTYPE", "M_DTYPE", "CORRECTED", "KEEPS_LAST_GRAD", "CLIPS")
        with torch.cuda.device_of(stack):
            self.kernels.matrices.momentum[self._grid(run)](
                *(*operands.of_block, *self._place(run), kappa, beta1, gamma, operands.results[0]),
                *(operands.table.zero if flag is None else flag, self.norms_of_g, self.factor, stack),
                **self.scaling,
                **{name: operands.update[name] for name in names},
                **self._options(run, stack),
            )
        return stack

    def move(self, run: Run, updates: Tensor, flag: Tensor | None) -> None:
        """x ← (1 − ηλ) x − η s · update."""
        operands, group = self.operands, self.group
        *_, decay = self.numbers
        (rate,) = bits([group["lr"] * update_scale(run.shape, group["layout"], group["adjust_lr_fn"])])
        with torch.cuda.device_of(updates):
            self.kernels.matrices.move[self._grid(run)](
                *(*operands.of_block, *self._place(run), rate, decay),
                *(operands.table.zero if flag is None else flag, updates),
                **{name: operands.update[name] for name in ("X_DTYPE", "COMPENSATED")},
                **self._options(run, updates),
            )

    def _grid(self, run: Run) -> tuple[int]:
        ends = self.operands.table.first_blocks
        return (ends[run.first + run.matrices] - ends[run.first],)

    def _place(self, run: Run) -> tuple[int, int, int]:
        return self.operands.table.first_blocks[run.first], run.first, math.prod(run.shape)

    def _options(self, run: Run, stack: Tensor) -> dict:
        names = ("WIDE", "ALIGNED", "BLOCK", "num_warps", "enable_fp_fusion")
        options = {name: self.operands.update[name] for name in names}
        return {**options, "STACK_ALIGNED": math.prod(run.shape) * stack.itemsize % ALIGNMENT == 0}
