"""What the host may do while it makes a step: look at values, or only record the work."""

from __future__ import annotations

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
