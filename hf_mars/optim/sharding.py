"""Parameters spread over processes. The only file that knows DTensor (FSDP2, HSDP, tensor parallelism) and ranks.

A step works on plain local tensors: this process's part of each parameter (`part_of`). Elementwise work needs no
communication. Two services need whole parameters: `norms_of_wholes`, for the clip, and `on_whole_matrices`, for
orthogonalisation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

Function = Callable[[list[Tensor]], list[Tensor]]
Replicas = dist.ProcessGroup


# ---- parts ----


class Part:
    """What this process holds of a parameter: here all of it."""

    def of(self, tensor: Tensor) -> Tensor:
        """This process's part of a tensor laid out like the parameter (gradient, state), in the same memory."""
        return tensor

    def whole_shape(self, part: Tensor) -> torch.Size:
        """The shape of the whole parameter, given this process's part of it."""
        return part.shape


WHOLE = Part()


class DTensorPart(Part):
    """The local shard of a DTensor."""

    def __init__(self, param: DTensor):
        self.param = param
        # The dimensions of the mesh along which ranks have different parts.
        self.mesh_dims = tuple(d for d, placement in enumerate(param.placements) if not placement.is_replicate())

    def of(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        if tensor.placements != self.param.placements:
            # Tensor parallelism leaves some gradients as sums still to be made, or laid out otherwise.
            tensor = tensor.redistribute(placements=self.param.placements)
        return tensor.to_local()

    def whole_shape(self, part: Tensor) -> torch.Size:
        return self.param.shape


def part_of(param: Tensor) -> Part:
    """How this process's memory lies in a parameter."""
    return DTensorPart(param) if isinstance(param, DTensor) else WHOLE


def elements_per_rank(tensor: Tensor, part: Part) -> int:
    """Elements of a parameter that a rank has, on average: the same number on every rank, if parts are uneven too."""
    if not isinstance(part, DTensorPart):
        return tensor.numel()
    shards = math.prod(part.param.device_mesh.size(d) for d in part.mesh_dims)
    return -(-part.param.numel() // shards)


def drop_gathered(params: list[Tensor]) -> None:
    """Make FSDP2 gather its parameters anew at their next use, for `params` have been changed under it.

    After a forward pass without a backward one (an evaluation) it keeps what it has gathered, and trusts it. Other
    models under FSDP2 only have to gather once more.
    """
    if any(isinstance(param, DTensor) for param in params):
        from torch.distributed._composable_state import _module_state_mapping  # nothing public leads there from params
        from torch.distributed.fsdp import FSDPModule

        for module in list(_module_state_mapping):
            if isinstance(module, FSDPModule):
                module.reshard()


# ---- norms ----


def norms_of_wholes(tensors: list[Tensor], parts: list[Part]) -> list[Tensor]:
    """‖·‖₂ of each whole tensor, given this process's parts of them: 0-d tensors on their device."""
    norms = _local_norms(tensors)
    if all(part is WHOLE for part in parts):
        return norms
    squares = add_up([norm.square() for norm in norms], parts)
    return [square.sqrt_() for square in squares]


def add_up(values: list[Tensor], parts: list[Part]) -> list[Tensor]:
    """Sums over the ranks of this process's values, one for each of `parts`: tensors of one shape.

    One small all-reduce for all tensors that are sharded alike; none for tensors that are not sharded.
    """
    sums = list(values)
    sharded: dict[tuple, list[int]] = {}
    for i, part in enumerate(parts):
        if isinstance(part, DTensorPart):
            sharded.setdefault((part.param.device_mesh, part.mesh_dims, values[i].dtype), []).append(i)
    for (mesh, mesh_dims, _), indices in sharded.items():
        stacked = torch.stack([values[i] for i in indices])
        for mesh_dim in mesh_dims:
            dist.all_reduce(stacked, group=mesh.get_group(mesh_dim))
        for i, value in zip(indices, stacked.unbind(), strict=True):
            sums[i] = value
    return sums


def _local_norms(tensors: list[Tensor]) -> list[Tensor]:
    """In float32 or better: a half precision can neither hold the squares nor add them up."""
    if all(t.is_cpu and t.is_contiguous() for t in tensors):
        # Twice as fast as torch's norm on CPUs.
        flat = [t.view(-1) if t.itemsize >= 4 else t.view(-1).float() for t in tensors]
        return [torch.dot(t, t).sqrt() for t in flat]
    results: dict[int, Tensor] = {}
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_dtype.setdefault(torch.promote_types(tensor.dtype, torch.float32), []).append(i)
    for dtype, indices in by_dtype.items():
        values = torch._foreach_norm([tensors[i] for i in indices], 2, dtype=dtype)
        results.update(zip(indices, values, strict=True))
    return [results[i] for i in range(len(tensors))]


def all_agree(value: bool, group: Replicas, device: torch.device) -> bool:
    """Whether `value` is true on all ranks of `group`, each of which must ask. Tensors on `device` are exchanged."""
    agreed = torch.tensor(int(value), device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=group)
    return bool(agreed.item())


def is_one_of_several() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


# ---- whole matrices ----


def on_whole_matrices(
    function: Function, tensors: list[Tensor], parts: list[Part], replicas: Replicas | None
) -> list[Tensor]:
    """Apply `function` to whole tensors of which this process has `tensors`; return its parts of the results.

    Every tensor is worked on by one rank only, where that can be arranged:

    - sharded along one mesh dimension: the ranks of that dimension send each other the shards of the matrices that
      they work on, and the results back (two all-to-alls, together twice the tensors' size spread over all ranks);
    - not sharded, with `replicas` given: each rank works on its share and broadcasts the results;
    - else every rank works on everything, on tensors sharded along several mesh dimensions after gathering them.

    Args:
        function: from a list of tensors to a list of tensors of the same shapes and dtypes.
        tensors: this process's local tensors.
        parts: how they lie in the whole ones.
        replicas: ranks whose `tensors` are equal, or None where that is not known.
    """
    ways: dict[tuple, list[int]] = {}
    for i, part in enumerate(parts):
        ways.setdefault((tensors[i].dtype, tensors[i].device, *_way(part, replicas)), []).append(i)
    results: dict[int, Tensor] = {}
    for (_, _, way, *where), indices in ways.items():
        chosen, chosen_parts = [tensors[i] for i in indices], [parts[i] for i in indices]
        results.update(zip(indices, way(function, chosen, chosen_parts, *where), strict=True))
    return [results[i] for i in range(len(tensors))]


def _way(part: Part, replicas: Replicas | None) -> tuple:
    """Which of the functions below works on a parameter, and its further arguments."""
    if not isinstance(part, DTensorPart):
        shares = replicas is not None and replicas.size() > 1
        return (_on_replicas, replicas) if shares else (_on_every_rank,)
    placements = part.param.placements
    if len(part.mesh_dims) == 1 and type(shard := placements[part.mesh_dims[0]]) is Shard:
        return _on_owners, part.param.device_mesh.get_group(part.mesh_dims[0]), shard.dim
    return (_on_gathered,)


def _on_every_rank(function: Function, tensors: list[Tensor], parts: list[Part]) -> list[Tensor]:
    return function(tensors)


def _on_gathered(function: Function, tensors: list[Tensor], parts: list[DTensorPart]) -> list[Tensor]:
    params = [part.param for part in parts]
    layouts = [(param.device_mesh, param.placements) for param in params]
    wholes = [
        DTensor.from_local(
            tensor, mesh, placements, run_check=False, shape=param.shape, stride=param.stride()
        ).full_tensor()
        for tensor, param, (mesh, placements) in zip(tensors, params, layouts, strict=True)
    ]
    return [
        DTensor.from_local(result, mesh, [Replicate()] * mesh.ndim, run_check=False)
        .redistribute(placements=placements)
        .to_local()
        for result, (mesh, placements) in zip(function(wholes), layouts, strict=True)
    ]


def _on_replicas(function: Function, tensors: list[Tensor], parts: list[Part], group: Replicas) -> list[Tensor]:
    ranks = range(group.size())
    owners = owners_of([tensor.shape for tensor in tensors], len(ranks))
    of_owner = [[i for i, owner in enumerate(owners) if owner == r] for r in ranks]
    buffers = [tensors[0].new_empty(sum(tensors[i].numel() for i in theirs)) for theirs in of_owner]
    buffers[group.rank()] = _pack(function([tensors[i] for i in of_owner[group.rank()]]), like=tensors[0])
    # Not an all-gather: that wants equal sizes, up to the largest matrix a rank where ranks outnumber matrices.
    sent = [
        dist.broadcast(buffer, dist.get_global_rank(group, r), group=group, async_op=True)
        for r, buffer in enumerate(buffers)
        if buffer.numel()
    ]
    for work in sent:
        work.wait()
    return _sorted_out(of_owner, buffers, tensors)


def _on_owners(
    function: Function, tensors: list[Tensor], parts: list[DTensorPart], group: Replicas, dim: int
) -> list[Tensor]:
    ranks = range(group.size())
    owners = owners_of([part.param.shape for part in parts], len(ranks))
    of_owner = [[i for i, owner in enumerate(owners) if owner == r] for r in ranks]
    mine = of_owner[group.rank()]
    # shapes[i][r]: of the i-th tensor, rank r's shard
    shapes = [_shard_shapes(part.param.shape, len(ranks), dim) for part in parts]

    # To every owner my shards of its tensors; from every rank its shards of mine.
    buffers = _all_to_all(
        [_pack([tensors[i] for i in theirs], like=tensors[0]) for theirs in of_owner],
        [sum(math.prod(shapes[i][r]) for i in mine) for r in ranks],
        group,
    )
    shards = [_unpack(buffers[r], [shapes[i][r] for i in mine]) for r in ranks]
    wholes = [torch.cat(shards_of_one, dim) for shards_of_one in zip(*shards, strict=True)]

    # The same way back.
    cut = [
        result.split([shape[dim] for shape in shapes[i]], dim)
        for i, result in zip(mine, function(wholes), strict=True)
    ]
    buffers = _all_to_all(
        [_pack([pieces[r] for pieces in cut], like=tensors[0]) for r in ranks],
        [sum(tensors[i].numel() for i in theirs) for theirs in of_owner],
        group,
    )
    return _sorted_out(of_owner, buffers, tensors)


def _sorted_out(of_owner: list[list[int]], buffers: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """The results out of the vector that each owner sent, in the order and shapes of `like`."""
    results: dict[int, Tensor] = {}
    for theirs, buffer in zip(of_owner, buffers, strict=True):
        results.update(zip(theirs, _unpack(buffer, [like[i].shape for i in theirs]), strict=True))
    return [results[i] for i in range(len(like))]


def _pack(tensors: list[Tensor], *, like: Tensor) -> Tensor:
    """All elements in one vector, empty if there are no tensors."""
    return torch.cat([t.flatten() for t in tensors]) if tensors else like.new_empty(0)


def _unpack(buffer: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Tensors of these shapes out of the beginning of a vector."""
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
    return [buffer[end - math.prod(shape) : end].view(shape) for end, shape in zip(ends, shapes, strict=True)]


def _all_to_all(sent: list[Tensor], counts: list[int], group: Replicas) -> list[Tensor]:
    """Send the r-th tensor to rank r of `group`; receive as many elements as `counts` says from each."""
    received = sent[0].new_empty(sum(counts))
    dist.all_to_all_single(received, torch.cat(sent), counts, [t.numel() for t in sent], group=group)
    return list(received.split(counts))


def _shard_shapes(shape: torch.Size, ranks: int, dim: int) -> list[tuple[int, ...]]:
    """Shapes of the shards of a tensor: as torch.chunk cuts it, then empty ones."""
    step = -(-shape[dim] // ranks)
    sizes = [max(0, min(step, shape[dim] - r * step)) for r in range(ranks)]
    return [(*shape[:dim], size, *shape[dim + 1 :]) for size in sizes]


def owners_of(shapes: list[torch.Size], ranks: int) -> list[int]:
    """Which rank works on which tensor: the most expensive first, each to the rank with the least work so far."""
    costs = [math.prod(shape) * min(shape[-2:]) for shape in shapes]
    loads = [0] * ranks
    owners = [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners
