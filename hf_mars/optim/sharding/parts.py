"""Parts: how this process's memory lies in a parameter, and which ranks hold the rest of it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

Ranks = dist.ProcessGroup


class Part:
    """What this process holds of a parameter: here all of it."""

    sums_over: tuple[Ranks, ...] = ()
    """Groups of ranks over which sums of parts add up, one group after the other, to those of the whole."""

    ranks: tuple[Ranks, ...] = ()
    """Groups of ranks that hold the rest of the parameter, or the same of it."""

    def of(self, tensor: Tensor) -> Tensor:
        """This process's part of a tensor laid out as the param_group's (gradient, state), in the same memory."""
        return tensor

    def whole_shape(self, part: Tensor) -> torch.Size:
        """The shape of the whole parameter, given this process's part of it."""
        return part.shape

    def elements_per_rank(self, part: Tensor) -> int:
        """Elements that a rank has, on average: the same number on every rank, if parts are uneven too."""
        return part.numel()


class Pieces(Part):
    """A part of a parameter whose pieces are spread over the ranks of one group, `spread_over`."""

    spread_over: Ranks

    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the pieces, in the order of ranks."""
        raise NotImplementedError

    def join(self, pieces: list[Tensor]) -> Tensor:
        """The whole tensor."""
        raise NotImplementedError

    def cut(self, whole: Tensor) -> list[Tensor]:
        """The pieces of a whole tensor."""
        raise NotImplementedError


WHOLE = Part()
FLAT = Part()  # a rank's slices of parameters, of which nothing but elementwise work is asked


@dataclass(frozen=True)
class Slice(Pieces):
    """A contiguous slice of the flattened parameter, which lies in a flat tensor together with those of others.

    Attributes:
        offset: where the slice begins in the flat tensor.
        shape: the whole parameter's.
        counts: of each rank, in order, how many elements its slice has; the slices follow each other.
        spread_over: the ranks.
    """

    offset: int
    shape: torch.Size
    counts: tuple[int, ...]
    spread_over: Ranks

    @property
    def sums_over(self) -> tuple[Ranks, ...]:  # type: ignore[override]
        return (self.spread_over,)

    @property
    def ranks(self) -> tuple[Ranks, ...]:  # type: ignore[override]
        return (self.spread_over,)

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(0, self.offset, self.counts[self.spread_over.rank()])

    def whole_shape(self, part: Tensor) -> torch.Size:
        return self.shape

    def elements_per_rank(self, part: Tensor) -> int:
        return -(-self.shape.numel() // len(self.counts))

    def shapes(self) -> list[tuple[int, ...]]:
        return [(count,) for count in self.counts]

    def join(self, pieces: list[Tensor]) -> Tensor:
        return torch.cat(pieces).view(self.shape)

    def cut(self, whole: Tensor) -> list[Tensor]:
        return list(whole.flatten().split(list(self.counts)))


class DTensorPart(Part):
    """The local shard of a DTensor."""

    def __init__(self, param: DTensor):
        self.param = param
        # The dimensions of the mesh along which ranks have different parts.
        self.mesh_dims = tuple(d for d, placement in enumerate(param.placements) if not placement.is_replicate())

    @property
    def sums_over(self) -> tuple[Ranks, ...]:  # type: ignore[override]
        return tuple(self.param.device_mesh.get_group(d) for d in self.mesh_dims)

    @property
    def ranks(self) -> tuple[Ranks, ...]:  # type: ignore[override]
        return tuple(self.param.device_mesh.get_all_groups())

    def of(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        if tensor.placements != self.param.placements:
            # Tensor parallelism leaves some gradients as sums still to be made, or laid out otherwise.
            tensor = tensor.redistribute(placements=self.param.placements)
        return tensor.to_local()

    def whole_shape(self, part: Tensor) -> torch.Size:
        return self.param.shape

    def elements_per_rank(self, part: Tensor) -> int:
        shards = math.prod(self.param.device_mesh.size(d) for d in self.mesh_dims)
        return -(-self.param.numel() // shards)


class Shards(DTensorPart, Pieces):
    """The local shard of a DTensor that is cut along one of its dimensions, over one dimension of the mesh."""

    def __init__(self, param: DTensor):
        super().__init__(param)
        (mesh_dim,) = self.mesh_dims
        shard = param.placements[mesh_dim]
        assert isinstance(shard, Shard)
        self.dim = shard.dim
        self.spread_over = param.device_mesh.get_group(mesh_dim)

    def shapes(self) -> list[tuple[int, ...]]:
        """As torch.chunk cuts, then empty ones."""
        shape, ranks = self.param.shape, self.spread_over.size()
        step = -(-shape[self.dim] // ranks)
        sizes = [max(0, min(step, shape[self.dim] - r * step)) for r in range(ranks)]
        return [(*shape[: self.dim], size, *shape[self.dim + 1 :]) for size in sizes]

    def join(self, pieces: list[Tensor]) -> Tensor:
        return torch.cat(pieces, self.dim)

    def cut(self, whole: Tensor) -> list[Tensor]:
        return list(whole.split([shape[self.dim] for shape in self.shapes()], self.dim))


def part_of(param: Tensor) -> Part:
    """How this process's memory lies in a parameter that no engine has flattened."""
    if not isinstance(param, DTensor):
        return WHOLE
    cuts = [placement for placement in param.placements if not placement.is_replicate()]
    return Shards(param) if len(cuts) == 1 and type(cuts[0]) is Shard else DTensorPart(param)


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's part of a tensor in the layout that it has: a plain tensor in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def owners_of(shapes: list[torch.Size], ranks: int) -> list[int]:
    """Which rank works on which tensor: the most expensive first, each to the rank with the least work so far."""
    costs = [math.prod(shape) * min(shape[-2:]) for shape in shapes]
    loads = [0] * ranks
    owners = [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


def pack(tensors: list[Tensor], *, like: Tensor) -> Tensor:
    """All elements in one vector, empty if there are no tensors."""
    return torch.cat([t.flatten() for t in tensors]) if tensors else like.new_empty(0)


def unpack(buffer: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Tensors of these shapes out of the beginning of a vector."""
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
    return [buffer[end - math.prod(shape) : end].view(shape) for end, shape in zip(ends, shapes, strict=True)]
