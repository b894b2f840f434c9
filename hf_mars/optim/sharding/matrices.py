"""Work on whole matrices of which each rank has a part."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from .agreement import all_ranks_can
from .devices import exchange_device
from .parts import DTensorPart, Part, Pieces, Ranks, owners_of, pack, unpack

Function = Callable[[list[Tensor]], list[Tensor]]


def on_whole_matrices(
    function: Function,
    tensors: list[Tensor],
    parts: list[Part],
    replicas: Ranks | None,
    in_bfloat16: Callable[[torch.Size], bool] = lambda shape: False,
    has_bfloat16: bool = False,
) -> list[Tensor]:
    """Apply `function` to whole tensors of which this process has `tensors`; return its parts of the results.

    Every tensor is worked on by one rank only, where that can be arranged:

    - in pieces over the ranks of one group (sharded along one mesh dimension, or slices): they send each other the
      pieces of the matrices that they work on, and the results back (two all-to-alls, together twice the tensors' size
      spread over all ranks);
    - whole, with `replicas` given: each rank works on its share and broadcasts the results;
    - else every rank works on everything, on tensors sharded along several mesh dimensions after gathering them.

    Args:
        function: from a list of tensors to a list of tensors of the same shapes and dtypes, or bfloat16.
        tensors: this process's local tensors.
        parts: how they lie in the whole ones.
        replicas: ranks whose `tensors` are equal, or None where that is not known.
        in_bfloat16: whether `function` begins with rounding a tensor of this shape to bfloat16 and ends with bfloat16,
            on machines that have it. Then ranks send each other that: half the bytes, the same bits.
        has_bfloat16: whether this process's machine has it.
    """
    ways: dict[tuple, list[int]] = {}
    for i, part in enumerate(parts):
        way, *where = _way(part, replicas)
        if where:
            halves = in_bfloat16(part.whole_shape(tensors[i])) and tensors[i].itemsize > 2
            halves = halves and all_ranks_can("bfloat16 products", has_bfloat16, where, tensors[i].device)
            where.append(torch.bfloat16 if halves else tensors[i].dtype)
        ways.setdefault((tensors[i].dtype, tensors[i].device, way, *where), []).append(i)
    results: dict[int, Tensor] = {}
    for (_, _, way, *where), indices in ways.items():
        chosen, chosen_parts = [tensors[i] for i in indices], [parts[i] for i in indices]
        results.update(zip(indices, way(function, chosen, chosen_parts, *where), strict=True))
    return [results[i] for i in range(len(tensors))]


def _way(part: Part, replicas: Ranks | None) -> tuple:
    """Which of the functions below works on a parameter, and its further arguments."""
    if isinstance(part, Pieces):
        return _on_owners, part.spread_over
    if isinstance(part, DTensorPart):
        return (_on_gathered,)
    shares = replicas is not None and replicas.size() > 1
    return (_on_replicas, replicas) if shares else (_on_every_rank,)


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


def _on_replicas(
    function: Function, tensors: list[Tensor], parts: list[Part], group: Ranks, dtype: torch.dtype
) -> list[Tensor]:
    ranks = range(group.size())
    owners = owners_of([tensor.shape for tensor in tensors], len(ranks))
    of_owner = [[i for i, owner in enumerate(owners) if owner == r] for r in ranks]
    buffers = [tensors[0].new_empty(sum(tensors[i].numel() for i in theirs), dtype=dtype) for theirs in of_owner]
    mine = function([tensors[i].to(dtype) for i in of_owner[group.rank()]])
    buffers[group.rank()] = pack(mine, like=buffers[group.rank()]).to(dtype)
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
    function: Function, tensors: list[Tensor], parts: list[Pieces], group: Ranks, dtype: torch.dtype
) -> list[Tensor]:
    ranks, device = range(group.size()), tensors[0].device
    there = exchange_device(group, device)
    owners = owners_of([part.whole_shape(t) for part, t in zip(parts, tensors, strict=True)], len(ranks))
    of_owner = [[i for i, owner in enumerate(owners) if owner == r] for r in ranks]
    mine = of_owner[group.rank()]
    # shapes[i][r]: of the i-th tensor, rank r's piece
    shapes = [part.shapes() for part in parts]

    # To every owner my pieces of its tensors; from every rank its pieces of mine.
    buffers = _all_to_all(
        [pack([tensors[i] for i in theirs], like=tensors[0]).to(there, dtype) for theirs in of_owner],
        [sum(math.prod(shapes[i][r]) for i in mine) for r in ranks],
        group,
    )
    received = [unpack(buffers[r], [shapes[i][r] for i in mine]) for r in ranks]
    wholes = [parts[i].join(list(pieces)) for i, pieces in zip(mine, zip(*received, strict=True), strict=True)]

    # The same way back.
    cut = [parts[i].cut(result) for i, result in zip(mine, function(wholes), strict=True)]
    buffers = _all_to_all(
        [pack([pieces[r] for pieces in cut], like=buffers[0]).to(dtype) for r in ranks],
        [sum(tensors[i].numel() for i in theirs) for theirs in of_owner],
        group,
    )
    return _sorted_out(of_owner, [buffer.to(device) for buffer in buffers], tensors)


def _sorted_out(of_owner: list[list[int]], buffers: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """The results out of the vector that each owner sent, in the order and shapes of `like`."""
    results: dict[int, Tensor] = {}
    for theirs, buffer in zip(of_owner, buffers, strict=True):
        results.update(zip(theirs, unpack(buffer, [like[i].shape for i in theirs]), strict=True))
    return [results[i] for i in range(len(like))]


def _all_to_all(sent: list[Tensor], counts: list[int], group: Ranks) -> list[Tensor]:
    """Send the r-th tensor to rank r of `group`; receive as many elements as `counts` says from each."""
    received = sent[0].new_empty(sum(counts))
    dist.all_to_all_single(received, torch.cat(sent), counts, [t.numel() for t in sent], group=group)
    return list(received.split(counts))
