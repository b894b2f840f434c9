"""Launches of the Triton kernels: of a step, and of the composition's clip."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch
from ..form import Form
from ..last_grad import LastNorms
from .plan import ALIGNMENT, BLOCK, DTYPES, Plan, Table

# Of a launch. Products are not fused with sums, so that they are rounded as torch's kernels round them; the kernels
# wait for memory, and lose no time by it.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
REDUCED = 1024  # partial sums that are added up at a time
PROGRAMS_PER_UNIT = 4  # multiprocessor, of the pass that mostly finds nothing to do


@dataclass(frozen=True)
class Kernels:
    """The modules of the kernels."""

    norms: ModuleType
    update: ModuleType
    matrices: ModuleType
    copies: ModuleType


class Operands:
    """What launches are given that is the same from step to step: memory between them, and their constants."""

    def __init__(self, table: Table, is_corrected: bool, keeps_last_grad: bool, clips: bool, plan: Plan):
        self.table, self.is_corrected, self.keeps_last_grad, self.clips = table, is_corrected, keeps_last_grad, clips
        self.is_adamw = "V" in plan.dtypes
        self.of_tensor = table.table, table.stride
        self.of_block = table.table, table.tensor_of_block, table.stride
        self.n = n = len(table.places)
        self.runs: list | None = None  # see matrices.py
        self.wide_dtype = wide = torch.promote_types(plan.dtypes["X"], torch.float32)

        def memory(size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device=table.device)

        self.knowledge = memory(n, torch.int32)
        self.sums = [memory(table.blocks if clips else 1, torch.float64) for _ in ("of g", "of c")]
        self.results = [memory(n, wide) for _ in ("factors", "step_sizes", "inverse_root_bias2")]
        self.norms_of_g = memory(n, wide)  # of no use without the clip
        types = {f"{name}_DTYPE": _triton_dtype(dtype) for name, dtype in plan.dtypes.items()}
        read = {"G_DTYPE": types["G_DTYPE"], "PREV_DTYPE": types.get("PREV_DTYPE", types["G_DTYPE"])}
        lanes = {"ALIGNED": table.is_aligned, "BLOCK": BLOCK, **OPTIONS}
        self.judge: dict[str, Any] = {"REDUCED": REDUCED, "WIDE": _triton_dtype(wide)}
        self.measure: dict[str, Any] = {"WIDE": _triton_dtype(wide), **read, **lanes}
        self.update: dict[str, Any] = {
            **self.measure,
            "X_DTYPE": types["X_DTYPE"],
            "M_DTYPE": types["M_DTYPE"],
            "V_DTYPE": types.get("V_DTYPE", types["M_DTYPE"]),
            "CORRECTED": is_corrected,
            "KEEPS_LAST_GRAD": keeps_last_grad,
            "CLIPS": clips,
            "IS_ADAMW": self.is_adamw,
            "COMPENSATED": "COMPENSATION" in plan.dtypes,
        }


def operands_of(table: Table, batch: Batch, plan: Plan) -> Operands:
    key = batch.previous_grads is not None, batch.form is Form.APPROX, batch.group["max_norm"] is not None
    if table.operands[0] != key:
        table.operands = key, Operands(table, *key, plan)
    return table.operands[1]


class Launch:
    """The launches of one step for batches with equal settings.

    Attributes:
        kernels, operands: what is launched, and what it is given in every step.
        group: the first param_group.
        device: of the tensors.
        numbers: κ, β1, β2, ε, γ, η, 1 − ηλ, as kernels take them.
        factor, scaling: f of the global clip, and whether there is one.
        norms_of_g: ‖g_t‖₂, of the dtype that is computed in; of no use without the clip.
        is_spread: norms take an exchange between ranks.
    """

    def __init__(self, kernels: Kernels, batches: list[Batch], operands: Operands, last_norms: LastNorms, stream: int):
        batch, group = batches[0], batches[0].group
        beta1, beta2 = group["betas"]
        lr, max_norm = batch.lr, group["max_norm"]
        numbers = (batch.kappa, beta1, beta2, group["eps"], batch.momentum_gamma, lr, 1 - lr * batch.weight_decay)
        self.kernels, self._batches, self.operands, self._stream = kernels, batches, operands, stream
        self._table = table = operands.table
        self.group, self.device = group, table.device
        *self.numbers, self._max_norm = bits((*numbers, max_norm or 0.0))
        # Norms are of wholes, and a rank has parts: of ‖g_{t−1}‖ of a part nothing follows.
        self.is_spread = operands.clips and not batch.is_whole
        self._bounds = operands.clips and batch.is_whole
        self.norms_of_g = operands.norms_of_g
        # f of the global clip: one for all batches of a step.
        factor = table.zero if batch.factor is None else batch.factor
        self.factor = factor if isinstance(factor, Tensor) else torch.tensor(factor, dtype=torch.float64)
        self.scaling = {"SCALES": batch.factor is not None}
        self._known: Tensor | None = None
        self._last_grads: list[Tensor] = []
        if operands.keeps_last_grad and operands.is_corrected:
            self._last_grads = self._tensors("previous_grads")
            if self._bounds:
                self._known = last_norms.take_vector(self._last_grads, stream)
                self.norms_of_g = torch.empty_like(operands.norms_of_g)

    @property
    def places(self) -> list[tuple[Batch, int]]:
        """Of each tensor, its batch and its place in it."""
        return [(self._batches[b], i) for b, i in self._table.places]

    def squares(self) -> Tensor:
        """Σ c² of this process's part of each tensor, in float64: where `is_spread`, for `measure`."""
        operands = self.operands
        totals = torch.empty(operands.n, dtype=torch.float64, device=self.device)
        with torch.cuda.device_of(totals):
            self._measure_blocks(torch.full_like(self.norms_of_g, torch.nan))
            sums = operands.sums[operands.is_corrected]
            self.kernels.norms.add_blocks[(operands.n,)](*operands.of_tensor, sums, totals, REDUCED=REDUCED)
        return totals

    def _measure_blocks(self, prev_norms: Tensor) -> None:
        operands = self.operands
        kappa, *_ = self.numbers
        self.kernels.norms.measure[(self._table.blocks,)](
            *(*operands.of_block, kappa, self._max_norm, prev_norms, *operands.sums, self.factor),
            CORRECTED=operands.is_corrected,
            **self.scaling,
            **operands.measure,
        )

    def measure(self, flag: Tensor | None, squares: Tensor | None = None) -> None:
        """Norms and what follows of them for each tensor; raises `flag`, if there is one, where c_t is not finite.

        Args:
            flag: a float32 number on the device, or None.
            squares: where `is_spread`, Σ c² of every whole tensor.
        """
        norms, table, operands = self.kernels.norms, self._table, self.operands
        kappa, beta1, beta2, _, _, lr, _ = self.numbers
        clips, n = operands.clips, operands.n
        if not clips and not operands.is_adamw:
            return
        sums = operands.sums if squares is None else [squares, squares]
        with torch.cuda.device_of(table.table):
            if clips and squares is None:
                prev_norms = self._known
                if prev_norms is None:
                    prev_norms = torch.full_like(self.norms_of_g, torch.nan)
                self._measure_blocks(prev_norms)
                if operands.is_corrected:
                    norms.judge[(n,)](
                        *(*operands.of_tensor, kappa, self._max_norm, prev_norms, operands.knowledge, sums[0]),
                        self.norms_of_g,
                        **operands.judge,
                    )
                if self._known is not None:  # else all have been measured
                    norms.measure_rest[(min(table.blocks, PROGRAMS_PER_UNIT * _units(table.device)),)](
                        *(*operands.of_tensor, n, kappa, operands.knowledge, sums[1], self.factor),
                        **self.scaling,
                        REDUCED=REDUCED,
                        **operands.measure,
                    )
            norms.prepare[(n,)](
                *(*operands.of_tensor, beta1, beta2, lr, self._max_norm, operands.knowledge, *sums),
                *operands.results,
                table.zero if flag is None else flag,
                CORRECTED=operands.is_corrected,
                CLIPS=clips,
                SPREAD=squares is not None,
                RAISES=flag is not None,
                IS_ADAMW=operands.is_adamw,
                **operands.judge,
            )

    def update(self, flag: Tensor | None, last_norms: LastNorms) -> None:
        """The update of all tensors, unless `flag` is raised."""
        table, operands = self._table, self.operands
        with torch.cuda.device_of(table.table):
            self.kernels.update.update[(table.blocks,)](
                *(*operands.of_block, *self.numbers, *operands.results),
                table.zero if flag is None else flag,
                self.norms_of_g,
                self.factor,
                **self.scaling,
                **operands.update,
            )
        self.finish(last_norms)

    def finish(self, last_norms: LastNorms) -> None:
        """What the kernels have changed is known to be, and ‖g_t‖₂ is remembered where it was measured."""
        # Behind autograd's back.
        torch.autograd.graph.increment_version(self._tensors("params"))
        if self._last_grads and last_norms.is_asked:
            torch.autograd.graph.increment_version(self._last_grads)
        if self._last_grads and self._bounds:
            last_norms.remember_vector(self._last_grads, self.norms_of_g, self._stream)

    def _tensors(self, name: str) -> list[Tensor]:
        if self._table.is_everything:
            return getattr(self._batches[0], name)
        rows = [getattr(batch, name) for batch in self._batches]
        return [rows[p][i] for p, i in self._table.places]


def divide(kernels: Kernels, tensors: list[Tensor], divisors: Tensor) -> None:
    """See gpu.py."""
    device = tensors[0].device
    addresses = [t.data_ptr() for t in tensors]
    is_aligned = not any(address % ALIGNMENT for address in addresses)
    with torch.cuda.device_of(tensors[0]):
        table = Table([t.numel() for t in tensors], {"X": addresses}, is_aligned, device)
        kernels.norms.divide[(table.blocks,)](
            *(table.table, table.tensor_of_block, table.stride, divisors),
            DTYPE=_triton_dtype(tensors[0].dtype),
            WIDE=_triton_dtype(torch.promote_types(tensors[0].dtype, torch.float32)),
            ALIGNED=is_aligned,
            BLOCK=BLOCK,
            **OPTIONS,
        )
    torch.autograd.graph.increment_version(tensors)


def bits(values: Iterable[float]) -> list[int]:
    """Floats as integers that kernels make float64 of: float arguments of a kernel would be float32.

    Of the negatives: hyperparameters are not negative, and so no value is an int32 here and an int64 there.
    """
    return array("q", array("d", [-value for value in values]).tobytes()).tolist()


@functools.cache
def _units(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, DTYPES[dtype])
