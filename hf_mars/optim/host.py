"""What the host may do while it makes a step: look at values, or only record the work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def reads_are_free(tensors: list[Tensor]) -> bool:
    """Whether the host can look at values without waiting for a device or breaking a compiled graph."""
    return all(t.is_cpu for t in tensors) and not torch.compiler.is_compiling()


def is_captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph is made of the work on `tensor`, instead of doing it."""
    if torch.compiler.is_compiling() or not tensor.is_cuda:
        return False
    with torch.cuda.device_of(tensor):
        return torch.cuda.is_current_stream_capturing()


def check_captured(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise a RuntimeError where a CUDA graph is made of a step that its replays could not take.

    They repeat the work on the device; what the host knows stays as it is. torch.optim asks for `capturable=True`.
    """
    chosen = [group for group in groups if group["params"] and is_captured(group["params"][0])]
    for group in chosen:
        if all(param.grad is None for param in group["params"]):
            continue
        lr = group["lr"]
        if not isinstance(lr, Tensor) or lr.is_cpu:
            raise RuntimeError(
                f"step() in a CUDA graph: every replay would take lr={lr}; make the optimizer with a tensor on the "
                "parameters' device (lr=torch.tensor(3e-3, device='cuda')), which schedulers fill anew"
            )
        if group["update"] == "adamw" and not group["fused"]:
            raise RuntimeError(
                f"step() in a CUDA graph: with foreach={group['foreach']}, fused={group['fused']} the host counts the "
                "steps, and every replay would correct the bias of the same one; make the optimizer with fused=True"
            )
