"""Sharded parameters (FSDP2's DTensors). The only file that knows them; elsewhere they act like whole tensors."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """The mesh that a tensor is sharded over; None where it is not. One kernel call takes tensors of one mesh."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all shards; a tensor that is not sharded is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, param: Tensor) -> Tensor:
    """Cut a whole tensor, equal on every rank, into the shards of ``param``. Needs no communication."""
    if not isinstance(param, DTensor):
        return tensor
    replicated = [Replicate()] * param.device_mesh.ndim
    return DTensor.from_local(tensor, param.device_mesh, replicated, run_check=False).redistribute(
        placements=param.placements
    )
