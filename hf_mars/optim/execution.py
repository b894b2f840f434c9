"""Who takes the step of a batch: kernels for GPUs or for CPUs, or a composition of torch's. Chosen here alone."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from . import composed
from .batch import Batch
from .groups import Group
from .kernels import cpu, gpu
from .last_grad import LastNorms
from .skipping import Skip


class Execution(Protocol):
    """A module that takes steps. Results do not depend on which, to rounding."""

    @property
    def __name__(self) -> str: ...

    def why_not(self, batch: Batch, /) -> str | None:
        """Why `step` cannot take `batch`; None if it can."""

    def measure(self, batches: list[Batch], last_norms: LastNorms, skip: Skip, /) -> Any:
        """What must be known of whole tensors before anything is changed: norms, for the clip. Changes nothing.

        Args:
            batches: those that `why_not` has no objection to.
            last_norms: the known ‖g_{t−1}‖₂, which are taken.
            skip: gets the norms that are measured anyway, unless it is decided.

        Returns:
            What `step` needs of it.
        """

    def step(self, batches: list[Batch], measured: Any, last_norms: LastNorms, skip: Skip, /) -> None:
        """c_t, c̃_t, m_t (and v_t), the update, and g_t in the place of g_{t−1}; nothing where `skip` says so.

        Modifies the parameters and their states; may overwrite `previous_grads`. Gradients are not modified.

        Args:
            batches: those of `measure`.
            measured: its result.
            last_norms: the known ‖g_{t−1}‖₂; brought up to date.
            skip: whether the step changes nothing; the host knows that it does not, or only devices know.
        """


def by_execution(batches: list[Batch], taken: dict[str, dict[str, None]]) -> list[tuple[Execution, list[Batch]]]:
    """Batches beside the execution that takes them, each execution once.

    Args:
        batches: of one step.
        taken: gets, by kind of parameter, the executions in words (in the order of an ordered set).
    """
    chosen: dict[str, tuple[Execution, list[Batch]]] = {}
    for batch in batches:
        execution, why_not = choose(batch)
        if not torch.compiler.is_compiling():
            words = _NAMES[execution.__name__] + (f" ({why_not})" if why_not else "")
            taken.setdefault(batch.group["kind"], {})[words] = None
        chosen.setdefault(execution.__name__, (execution, []))[1].append(batch)
    return list(chosen.values())


def choose(batch: Batch) -> tuple[Execution, str | None]:
    """The execution for a batch; and, where that is the composition, the reason that no kernel takes it."""
    if torch.compiler.is_compiling():
        return composed, "the compiler fuses torch's kernels by itself"
    device = batch.params[0].device
    why_not: str | None = f"there are no kernels for {device.type}"
    for kernels in (gpu, cpu):
        if kernels.is_for(device):
            why_not = kernels.why_not(batch)
            if why_not is None:
                return kernels, None
    return composed, why_not


_NAMES = {composed.__name__: "torch's kernels", cpu.__name__: "the compiled step", gpu.__name__: "Triton's kernels"}


def fused_in_effect(group: Group) -> object:
    """A group's `fused`, in words where it asks for this package's kernels of CPUs and they are missing."""
    on_cpus = all(param.device.type == "cpu" for param in group["params"])
    if group["fused"] and on_cpus and not cpu.is_compiled() and (group["gamma"] != 0 or group["update"] != "adamw"):
        return "torch's kernels alone (the compiled step of hf_mars is missing)"
    return group["fused"]
