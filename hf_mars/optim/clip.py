"""What is known of gradients that were clipped by their total norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .host import reads_are_free


@dataclass
class Clip:
    """What is known of gradients that were clipped.

    Attributes:
        total_norm: ‖g‖₂ of all of them before the clip, a 0-d tensor.
        factor: f, a 0-d tensor beside it; g_t is f · g.
        norms: ‖g‖₂ of each parameter's before the clip, numbers; empty where the host does not know them.
        is_measured: total_norm was measured here; else it was given.
        captured: whether it was measured in a CUDA graph, whose replays measure anew.
    """

    total_norm: Tensor
    factor: Tensor
    norms: dict[Tensor, float]
    is_measured: bool = True
    captured: bool = False

    def factor_on(self, device: torch.device) -> float | Tensor | None:
        """f for tensors on `device`; None where the host knows that it is 1."""
        if not reads_are_free([self.factor]):
            return self.factor.to(device, non_blocking=True)
        factor = self.factor.item()
        if device.type == "cpu":
            return None if factor == 1 else factor
        return None if factor == 1 else self.factor.to(device)
