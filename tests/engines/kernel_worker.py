"""One rank of test_sharing.py: sharded float32 parameters step in the compiled kernels, as they do composed.

Usage: kernel_worker.py ENGINE. Rank 0 prints, as JSON, for every setting how many batches the kernels took, the
largest relative difference, and the most exchanges between ranks in one step; with the engine "one rank cannot", of
the two ranks one lacks the kernels. With TRITON_INTERPRET=1 they are those for GPUs.
"""

import itertools
import json
import os
import sys

import torch
import torch.distributed as dist
from meshes import mesh_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_mars.optim import MarsAdamW, MarsLion
from hf_mars.optim.kernels import cpu, gpu
from hf_mars.optim.kernels.plan import BLOCK

STEPS = 6
SETTINGS = {
    f"{cls.__name__} {name}": (cls, settings)
    for cls in (MarsAdamW, MarsLion)
    for name, settings in {
        "clipped": {"max_norm": 1.0},
        "without": {"max_norm": None},
        "gamma 0 clipped": {"gamma": 0.0, "max_norm": 1.0},
    }.items()
}
# Uneven shards, an empty one, and one of more than a block of the kernels: the interpreter of those for GPUs is slow.
SIDES = (7, 60, 71, 5, 1) if gpu.is_interpreted() else (7, 300, 301, 5, 1)
assert not gpu.is_interpreted() or 60 * 36 > BLOCK


def make_model(engine):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(SIDES)))
    shape, names = ((2, dist.get_world_size() // 2), ("replicate", "shard")) if engine == "hsdp" else (None, None)
    fully_shard(model, mesh=mesh_of("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names))
    return model


class Reductions:
    """Counts all-reduces."""

    def __init__(self):
        self.count, self.reduce = 0, dist.all_reduce
        dist.all_reduce = self

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.reduce(*args, **kwargs)


def train(engine, cls, reductions, **settings):
    """Final values, and the most all-reduces in a step but the first, where ranks agree about the kernels."""
    model = make_model(engine)
    optimizer = cls(model.parameters(), lr=0.01, weight_decay=0.1, **settings)
    generator, most = torch.Generator().manual_seed(1), 0
    for t in range(STEPS):
        for i, p in enumerate(model.parameters()):
            g = 10.0 ** (t % 3 - 1) * torch.randn(p.shape, generator=generator) / p.numel() ** 0.5  # below and above 1
            if settings["max_norm"] is not None and t == 3 and i == 2:
                g.view(-1)[0] = float("nan")  # a step that changes nothing
            p.grad = distribute_tensor(g, p.device_mesh, p.placements)
            if i == 0 and dist.get_rank() == 1:  # other launches than on the other ranks
                p.grad = unaligned(p.grad)
        before = reductions.count
        optimizer.step()
        most = 0 if t == 0 else max(most, reductions.count - before)
    return [p.full_tensor() for p in model.parameters()], most


def unaligned(tensor):
    """The same, as it may lie in an engine's buffer: its memory begins at an odd place."""
    local = tensor.to_local()
    shifted = torch.cat([local.new_zeros(1), local.flatten()])[1:].view(local.shape)
    where = (tensor.device_mesh, tensor.placements)
    return DTensor.from_local(shifted, *where, run_check=False, shape=tensor.shape, stride=tensor.stride())


def difference(one, other):
    return ((one - other).abs().max() / one.abs().max()).item()


def main(engine):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if engine == "one rank cannot" and dist.get_rank() == 1:
        cpu._cpu = None
        gpu.kernels_for = lambda device: None
    taken = []
    execution = gpu if gpu.is_interpreted() else cpu
    step = execution.step
    execution.step = lambda batches, *others: taken.extend(batches) or step(batches, *others)
    reductions = Reductions()
    found = {}
    for name, (cls, settings) in SETTINGS.items():
        expected, _ = train(engine, cls, reductions, fused=False, **settings)
        assert not taken
        finals, most = train(engine, cls, reductions, **settings)
        found[name] = [len(taken), max(map(difference, expected, finals)), most]
        taken.clear()
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    os._exit(0)  # gloo can hang when a process group is torn down


if __name__ == "__main__":
    main(sys.argv[1])
