"""Where ranks can exchange tensors."""

from __future__ import annotations

import torch
import torch.distributed as dist


def exchange_device(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """The device on which the ranks of `group` exchange tensors of `device`.

    It is `device` where the group has a backend for it; the accelerator where states are offloaded to CPUs and the
    ranks talk by NCCL alone.
    """
    types = {d.type for d in group._device_types}
    if device.type in types:
        return device
    (other,) = sorted(types)[:1]
    return torch.device(other, torch.accelerator.current_device_index())
