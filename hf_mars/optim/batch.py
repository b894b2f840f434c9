"""What one step works on: parameters that are updated in the same way, beside their gradients and states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from torch import Tensor

from .correction import reads_are_free
from .precision import needs_wide_copies
from .sharding import elements_a_rank, is_sharded


@dataclass
class Batch:
    """Parameters of one group that have a gradient, and what their update needs. Gradients are this rank's parts."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Any]]
    previous_grads: list[Tensor] | None  # what κ's bracket subtracts; None: κ = 0, or the one-tensor form
    kernels: ModuleType | None = None  # cpu or gpu: the step in few passes over memory; None: composed of torch's
    c: list[Tensor] | None = None
    norms: list[Tensor] | list[float] | None = None  # ‖c_t‖₂; numbers where the host may look at them
    finite: list[bool] | None = None  # whether g_t is, where the host knows

    @property
    def keeps_last_grad(self) -> bool:
        return self.previous_grads is not None and not self.group["exact"]

    @property
    def gamma(self) -> float:
        """γ of correction.momentum: where g_{t−1} is not kept, the momentum of plain gradients does the correction."""
        return self.group["gamma"] if self.previous_grads is None and not self.group["exact"] else 0.0

    @property
    def takes_wide_copies(self) -> bool:
        return any(needs_wide_copies(dtype, self.group) for dtype in {param.dtype for param in self.params})

    @property
    def takes_copies(self) -> bool:
        if self.kernels is not None:
            return False
        if not self.keeps_last_grad:
            return self.takes_wide_copies
        pairs = zip(self.previous_grads, self.grads, strict=True)
        return self.takes_wide_copies or any(last.dtype != grad.dtype for last, grad in pairs)

    @property
    def wants_norms(self) -> bool:
        # Without the clip they tell a CPU whether g_t is finite, for one pass over memory instead of a copy's three.
        can_tell = self.keeps_last_grad and reads_are_free(self.grads) and not any(map(is_sharded, self.params))
        return self.group["max_norm"] is not None or can_tell

    def pieces(self, elements: int) -> Iterator[Batch]:
        """The same in batches of at most so many elements, or of one parameter; the same batches on every rank."""
        start, count = 0, 0
        for i, size in enumerate(map(elements_a_rank, self.params)):
            if i > start and count + size > elements:
                yield self._piece(slice(start, i))
                start, count = i, 0
            count += size
        yield self._piece(slice(start, None))

    def _piece(self, part: slice) -> Batch:
        previous_grads = None if self.previous_grads is None else self.previous_grads[part]
        return replace(
            self,
            params=self.params[part],
            grads=self.grads[part],
            states=self.states[part],
            previous_grads=previous_grads,
        )
