"""Parameters spread over processes. The only file that knows DTensor (FSDP2, HSDP, tensor parallelism) and ranks.

Elementwise work needs no communication: it runs on each rank's own part, :func:`local`. Two things need the whole of a
parameter: the norm of the clip (:func:`norms`) and orthogonalisation (:func:`on_whole_matrices`).
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


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in the same memory; a tensor that is not sharded is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor."""
    return isinstance(tensor, DTensor)


def local_grad(param: Tensor, grad: Tensor | None = None) -> Tensor:
    """The part of ``grad`` (default: ``param.grad``) that belongs to this rank's part of ``param``.

    Tensor parallelism leaves some gradients as sums still to be made, or laid out otherwise than the parameter.
    """
    grad = param.grad if grad is None else grad
    if isinstance(grad, DTensor) and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return local(grad)


def drop_gathered(params: list[Tensor]) -> None:
    """Make FSDP2 gather its parameters anew at their next use, for ``params`` have been changed under it.

    After a forward pass without a backward one (an evaluation) it keeps what it has gathered, and trusts it. Other
    models under FSDP2 only have to gather once more.
    """
    if any(map(is_sharded, params)):
        from torch.distributed._composable_state import _module_state_mapping  # nothing public leads there from params
        from torch.distributed.fsdp import FSDPModule

        for module in list(_module_state_mapping):
            if isinstance(module, FSDPModule):
                module.reshard()


def _sharded_dims(param: DTensor) -> tuple[int, ...]:
    """The dimensions of the mesh along which ranks have different parts of ``param``."""
    return tuple(d for d, placement in enumerate(param.placements) if not placement.is_replicate())


def elements_a_rank(param: Tensor) -> int:
    """How many elements a rank has of a tensor, on average: the same number on every rank, if parts are uneven too."""
    shards = math.prod(param.device_mesh.size(d) for d in _sharded_dims(param)) if is_sharded(param) else 1
    return -(-param.numel() // shards)


# ---- norms ----


def norms(parts: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    """‖·‖₂ of each whole tensor, given this rank's parts, as 0-d tensors on their device."""
    values = _local_norms(parts)
    if any(map(is_sharded, params)):
        values = [square.sqrt_() for square in add_up([value.square() for value in values], params)]
    return values


def add_up(values: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    """Sums over the ranks' parts of each of ``params``, given this rank's sums: tensors of one shape.

    One small all-reduce for all tensors that are sharded alike; none for tensors that are not sharded.
    """
    sums = list(values)
    sharded: dict[tuple, list[int]] = {}
    for i, param in enumerate(params):
        if isinstance(param, DTensor):
            sharded.setdefault((param.device_mesh, _sharded_dims(param), values[i].dtype), []).append(i)
    for (mesh, mesh_dims, _), indices in sharded.items():
        stacked = torch.stack([values[i] for i in indices])
        for mesh_dim in mesh_dims:
            dist.all_reduce(stacked, group=mesh.get_group(mesh_dim))
        for i, value in zip(indices, stacked.unbind(), strict=True):
            sums[i] = value
    return sums


def _local_norms(parts: list[Tensor]) -> list[Tensor]:
    """In float32 or better: a half precision can neither hold the squares nor add them up."""
    if all(t.is_cpu and t.is_contiguous() for t in parts):
        # Twice as fast as torch's norm on CPUs.
        flat = [t.view(-1) if t.itemsize >= 4 else t.view(-1).float() for t in parts]
        return [torch.dot(t, t).sqrt() for t in flat]
    results: list[Tensor] = [None] * len(parts)
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, part in enumerate(parts):
        by_dtype.setdefault(torch.promote_types(part.dtype, torch.float32), []).append(i)
    for dtype, indices in by_dtype.items():
        values = torch._foreach_norm([parts[i] for i in indices], 2, dtype=dtype)
        for i, value in zip(indices, values, strict=True):
            results[i] = value
    return results


# ---- whole matrices ----


def on_whole_matrices(
    function: Function, parts: list[Tensor], params: list[Tensor], replicas: dist.ProcessGroup | None
) -> list[Tensor]:
    """Apply ``function`` to whole tensors of which this rank has ``parts``; return its parts of the results.

    Every tensor is worked on by one rank only, where that can be arranged:

    - sharded along one mesh dimension: the ranks of that dimension send each other the shards of the matrices that
      they work on, and the results back (two all-to-alls, together twice the tensors' size spread over all ranks);
    - not sharded, with ``replicas`` given: each rank works on its share and broadcasts the results;
    - else every rank works on everything, on tensors sharded along several mesh dimensions after gathering them.

    Args:
        function: from a list of tensors to a list of tensors of the same shapes and dtypes.
        parts: this rank's local tensors.
        params: their parameters, which say how they are sharded.
        replicas: ranks whose ``parts`` are equal, or None where that is not known.
    """
    results: list[Tensor] = [None] * len(parts)
    ways: dict[tuple, list[int]] = {}
    for i, param in enumerate(params):
        ways.setdefault((parts[i].dtype, parts[i].device, *_way(param, replicas)), []).append(i)
    for (_, _, way, *where), indices in ways.items():
        chosen_parts, chosen_params = [parts[i] for i in indices], [params[i] for i in indices]
        for i, result in zip(indices, way(function, chosen_parts, chosen_params, *where), strict=True):
            results[i] = result
    return results


def _way(param: Tensor, replicas: dist.ProcessGroup | None) -> tuple:
    """Which of the functions below works on ``param``, and its further arguments."""
    if not isinstance(param, DTensor):
        shares = replicas is not None and replicas.size() > 1
        return (_on_replicas, replicas) if shares else (_on_every_rank,)
    mesh_dims = _sharded_dims(param)
    if len(mesh_dims) == 1 and type(param.placements[mesh_dims[0]]) is Shard:
        group = param.device_mesh.get_group(mesh_dims[0])
        return (_on_owners, group, param.placements[mesh_dims[0]].dim)
    return (_on_gathered,)


def _on_every_rank(function: Function, parts: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    return function(parts)


def _on_gathered(function: Function, parts: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    layouts = [(param.device_mesh, param.placements) for param in params]
    wholes = [
        DTensor.from_local(
            part, mesh, placements, run_check=False, shape=param.shape, stride=param.stride()
        ).full_tensor()
        for part, param, (mesh, placements) in zip(parts, params, layouts, strict=True)
    ]
    return [
        DTensor.from_local(result, mesh, [Replicate()] * mesh.ndim, run_check=False)
        .redistribute(placements=placements)
        .to_local()
        for result, (mesh, placements) in zip(function(wholes), layouts, strict=True)
    ]


def _on_replicas(
    function: Function, parts: list[Tensor], params: list[Tensor], group: dist.ProcessGroup
) -> list[Tensor]:
    ranks = range(group.size())
    owners = _owners(params, len(ranks))
    of_owner = [[i for i, owner in enumerate(owners) if owner == r] for r in ranks]
    buffers = [parts[0].new_empty(sum(parts[i].numel() for i in theirs)) for theirs in of_owner]
    buffers[group.rank()] = _pack(function([parts[i] for i in of_owner[group.rank()]]), like=parts[0])
    # Not an all-gather: that wants equal sizes, up to the largest matrix a rank where ranks outnumber matrices.
    sent = [
        dist.broadcast(buffer, dist.get_global_rank(group, r), group=group, async_op=True)
        for r, buffer in enumerate(buffers)
        if buffer.numel()
    ]
    for work in sent:
        work.wait()
    results: list[Tensor] = [None] * len(parts)
    for theirs, buffer in zip(of_owner, buffers, strict=True):
        for i, result in zip(theirs, _unpack(buffer, [parts[i].shape for i in theirs]), strict=True):
            results[i] = result
    return results


def _on_owners(
    function: Function, parts: list[Tensor], params: list[Tensor], group: dist.ProcessGroup, dim: int
) -> list[Tensor]:
    ranks = range(group.size())
    owners = _owners(params, len(ranks))
    of_owner = [[i for i, owner in enumerate(owners) if owner == r] for r in ranks]
    mine = of_owner[group.rank()]
    shapes = [
        _shard_shapes(param.shape, len(ranks), dim) for param in params
    ]  # shapes[i][r]: the i-th tensor's, rank r's

    # To every owner my shards of its tensors; from every rank its shards of mine.
    buffers = _all_to_all(
        [_pack([parts[i] for i in theirs], like=parts[0]) for theirs in of_owner],
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
        [_pack([pieces[r] for pieces in cut], like=parts[0]) for r in ranks],
        [sum(parts[i].numel() for i in theirs) for theirs in of_owner],
        group,
    )
    results: list[Tensor] = [None] * len(parts)
    for theirs, buffer in zip(of_owner, buffers, strict=True):
        for i, result in zip(theirs, _unpack(buffer, [parts[i].shape for i in theirs]), strict=True):
            results[i] = result
    return results


def _pack(tensors: list[Tensor], *, like: Tensor) -> Tensor:
    """All elements in one vector, empty if there are no tensors."""
    return torch.cat([t.flatten() for t in tensors]) if tensors else like.new_empty(0)


def _unpack(buffer: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Tensors of these shapes out of the beginning of a vector."""
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
    return [buffer[end - math.prod(shape) : end].view(shape) for end, shape in zip(ends, shapes, strict=True)]


def _all_to_all(sent: list[Tensor], counts: list[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Send the r-th tensor to rank r of ``group``; receive as many elements as ``counts`` says from each."""
    received = sent[0].new_empty(sum(counts))
    dist.all_to_all_single(received, torch.cat(sent), counts, [t.numel() for t in sent], group=group)
    return list(received.split(counts))


def _shard_shapes(shape: torch.Size, ranks: int, dim: int) -> list[tuple[int, ...]]:
    """Shapes of the shards of a tensor: as torch.chunk cuts it, then empty ones."""
    step = -(-shape[dim] // ranks)
    sizes = [max(0, min(step, shape[dim] - r * step)) for r in range(ranks)]
    return [(*shape[:dim], size, *shape[dim + 1 :]) for size in sizes]


def _owners(params: list[Tensor], ranks: int) -> list[int]:
    """Which rank works on which tensor: the most expensive first, each to the rank with the least work so far."""
    costs = [param.numel() * min(param.shape[-2:]) for param in params]
    loads = [0] * ranks
    owners = [0] * len(params)
    for i in sorted(range(len(params)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners
