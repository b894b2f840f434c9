"""Who takes the step of a batch: kernels for GPUs or for CPUs, or a composition of torch's. Chosen here alone."""

from __future__ import annotations

from collections.abc import Iterator
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

    def measure(self, batches: list[Batch], last_norms: LastNorms, skip: Skip, /) -> Any:
        """What must be known of whole tensors before anything is changed: norms, for the clip. Changes nothing.

        Args:
            batches: what it can take, as `gpu.split` and `cpu.why_not` say; the composition takes every batch.
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
    is_compiling = torch.compiler.is_compiling()
    for batch in batches:
        for execution, some, why_not in _shares(batch, is_compiling):
            if not is_compiling:
                words = _NAMES[execution.__name__] + (f" ({why_not})" if why_not else "")
                taken.setdefault(batch.group["kind"], {})[words] = None
            chosen.setdefault(execution.__name__, (execution, []))[1].append(some)
    return list(chosen.values())


def _shares(batch: Batch, is_compiling: bool) -> Iterator[tuple[Execution, Batch, str | None]]:
    """What of a batch kernels take, and the rest, which is composed, with the reason."""
    if is_compiling:
        yield composed, batch, "the compiler fuses torch's kernels by itself"
        return
    device = batch.params[0].device
    rest: Batch | None = batch
    why_not: str | None = f"there are no kernels for {device.type}"
    if gpu.is_for(device):
        taken, rest, why_not = gpu.split(batch)
        if taken is not None:
            yield gpu, taken, None
    elif cpu.is_for(device):
        why_not = cpu.why_not(batch)
        if why_not is None:
            yield cpu, batch, None
            return
    if rest is not None:
        yield composed, rest.clipped(), why_not


_NAMES = {composed.__name__: "torch's kernels", cpu.__name__: "the compiled step", gpu.__name__: "Triton's kernels"}


def fused_in_effect(group: Group) -> object:
    """A group's `fused`, in words where it asks for this package's kernels of CPUs and they are missing."""
    on_cpus = all(param.device.type == "cpu" for param in group["params"])
    if group["fused"] and on_cpus and not cpu.is_compiled() and (group["gamma"] != 0 or group["update"] != "adamw"):
        return "torch's kernels alone (the compiled step of hf_mars is missing)"
    return group["fused"]


def why_composed(group: Group) -> str | None:
    """Why the step of a param_group is composed of torch's kernels, as far as is known before it; None if it is not.

    Groups of kind "1d" do not count, whose tensors are small.
    """
    params = group["params"]
    if not params or group["kind"] == "1d":
        return None
    if group["update"] == "shampoo":
        return "Newton–Schulz is composed of torch's kernels"
    if group["foreach"] is not None or not group["fused"]:
        return f"foreach={group['foreach']}, fused={group['fused']}"
    if group["update"] == "adamw" and group["gamma"] == 0 and group["max_norm"] is None:
        return "plain AdamW is torch's"
    if any(param.is_cpu for param in params) and not gpu.is_interpreted():
        if not cpu.is_compiled():
            return "the compiled step is missing"
        dtypes = {param.dtype for param in params} | {
            group[key] or "float32" for key in ("last_grad_dtype", "state_dtype")
        }
        return None if dtypes <= {torch.float32, "float32"} else "the compiled step takes float32 alone"
    return None
