"""Steps that change nothing, since a gradient is not finite: the decision, and the count.

A norm that somebody has measured anyway decides: it is not finite where one of its gradients is not. Where the host
can read it without waiting, the step ends before it begins; else the decision stays on the devices, as a flag.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .groups import Group
from .host import reads_are_free
from .sharding import Originals, Part, norms_of_wholes

Norm = Tensor | float
# Flags that are added up at a time, on the device.
FLAGS = 256


class Skip:
    """Whether the step under way changes nothing.

    Args:
        norms: those that decide, by being finite or not. None decides nothing, until some are added.
        is_complete: they are of all gradients; else only of those of groups with `skip_nonfinite`.
    """

    def __init__(self, norms: Sequence[Norm] = (), *, is_complete: bool = False):
        self._norms: list[Norm] = list(norms)
        self._is_complete = is_complete
        self._raised: list[Tensor] = []  # flags that kernels raise, at most one per device
        self._on_host: bool | None = None
        self._flags: dict[torch.device, Tensor] = {}

    def covers(self, group: Group) -> bool:
        """Whether the gradients of a param_group were measured before the step."""
        return self._is_complete or bool(group["skip_nonfinite"])

    def add(self, norms: Sequence[Norm]) -> None:
        """More norms that decide."""
        self._norms += norms

    def add_flag(self, flag: Tensor) -> None:
        """A flag that kernels raise: a float32 number on their device, 0 or 1."""
        self._raised.append(flag)

    def on_host(self) -> bool | None:
        """The decision; None if there is none, or where only devices know it."""
        if self._on_host is None and (self._norms or self._raised):
            tensors = [value for value in (*self._norms, *self._raised) if isinstance(value, Tensor)]
            if reads_are_free(tensors):
                is_bad = any(not math.isfinite(norm) for norm in self._norms)  # reads tensors
                self._on_host = is_bad or any(bool(flag) for flag in self._raised)
        return self._on_host

    def flag(self, device: torch.device) -> Tensor | None:
        """1 where the step changes nothing, else 0: a float32 number on `device`; None if the host knows."""
        if self._on_host is not None or not (self._norms or self._raised):
            return None
        if device not in self._flags:
            parts = [flag.to(device, non_blocking=True) for flag in self._raised]
            if self._norms:
                norms = [torch.as_tensor(norm).to(device, non_blocking=True) for norm in self._norms]
                values = torch.hstack(norms)
                parts.append((values - values).sum().ne(0).float())  # x − x is NaN where x is not finite
            self._flags[device] = parts[0] if len(parts) == 1 else torch.stack(parts).amax()
        return self._flags[device]


def norms_to_skip_by(
    groups: list[Group], previous_grads: Mapping[Tensor, Tensor], originals: Originals
) -> list[Tensor]:
    """‖g_t‖₂, and ‖∇f(x_{t−1}, ξ_t)‖₂ where that was evaluated, of the parameters of groups with `skip_nonfinite`."""
    groups = [group for group in groups if group["skip_nonfinite"]]
    if not groups:
        return []
    tensors: list[Tensor] = []
    parts: list[Part] = []
    for group in groups:
        for param in group["params"]:
            if param.grad is None or param.grad.is_sparse:
                continue
            own = originals.parts_of(param, group)
            for grad in [param.grad, *([previous_grads[param]] if param in previous_grads else [])]:
                tensors += [part.of(grad) for part in own]
                parts += own
    return norms_of_wholes(tensors, parts)


class SkippedSteps:
    """How many steps changed nothing. Nothing is read from a device before it is asked for."""

    def __init__(self) -> None:
        self._total = self._in_a_row = 0  # those that the host knows of
        self._flags: list[Tensor] = []  # of the steps since
        self._sums: Tensor | None = None  # (total, in a row) of steps before those, on the device

    def count(self, skip: Skip, groups: list[Group]) -> None:
        """Note the decision about a step of `groups`."""
        is_bad = skip.on_host()
        if is_bad is None:
            device = next((param.device for group in groups for param in group["params"]), torch.device("cpu"))
            if (flag := skip.flag(device)) is None:  # nothing decides
                return
            self._flags.append(flag)
            if len(self._flags) == FLAGS:
                self._add_up()
            return
        self._settle()
        self._total += is_bad
        self._in_a_row = self._in_a_row + 1 if is_bad else 0

    def read(self) -> tuple[int, int]:
        """All of them, and those in a row up to the last step. Waits for the device, where decisions are there."""
        self._settle()
        return self._total, self._in_a_row

    def _settle(self) -> None:
        if self._flags:
            self._add_up()
        if self._sums is not None:
            self._total, self._in_a_row = (int(x) for x in self._sums.tolist())
            self._sums = None

    def _add_up(self) -> None:
        flags = torch.stack([flag.reshape(()) for flag in self._flags]).to(torch.int64)
        self._flags = []
        if self._sums is None:
            self._sums = flags.new_tensor([self._total, self._in_a_row])
        total, before = self._sums.to(flags.device).unbind()
        row = flags.flip(0).cumprod(0).sum()
        self._sums = torch.stack([total + flags.sum(), torch.where(row == len(flags), before + row, row)])
