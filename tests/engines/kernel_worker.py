"""One rank of test_sharing.py: sharded float32 parameters step in the compiled kernels, as they do composed.

Usage: kernel_worker.py ENGINE. Rank 0 prints, as JSON, for every setting how many batches the kernels took and the
largest relative difference; with the engine "one rank cannot", of the two ranks one lacks the compiled step.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from hf_mars.optim import MarsAdamW, MarsLion
from hf_mars.optim.kernels import cpu

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


def make_model(engine):
    """Uneven shards, an empty one, and one of more than a block of the kernels."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in ((7, 300), (300, 301), (301, 5), (5, 1))))
    shape, names = ((2, dist.get_world_size() // 2), ("replicate", "shard")) if engine == "hsdp" else (None, None)
    fully_shard(model, mesh=init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names))
    return model


def train(engine, cls, **settings):
    model = make_model(engine)
    optimizer = cls(model.parameters(), lr=0.01, weight_decay=0.1, **settings)
    generator = torch.Generator().manual_seed(1)
    for t in range(STEPS):
        for i, p in enumerate(model.parameters()):
            g = 10.0 ** (t % 3 - 1) * torch.randn(p.shape, generator=generator) / p.numel() ** 0.5  # below and above 1
            if settings["max_norm"] is not None and t == 3 and i == 2:
                g.view(-1)[0] = float("nan")  # a step that changes nothing
            p.grad = distribute_tensor(g, p.device_mesh, p.placements)
        optimizer.step()
    return [p.full_tensor() for p in model.parameters()]


def difference(one, other):
    return ((one - other).abs().max() / one.abs().max()).item()


def main(engine):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if engine == "one rank cannot" and dist.get_rank() == 1:
        cpu._cpu = None
    taken = []
    step = cpu._step
    cpu._step = lambda batch, *others: taken.append(batch) or step(batch, *others)
    found = {}
    for name, (cls, settings) in SETTINGS.items():
        expected = train(engine, cls, fused=False, **settings)
        assert not taken
        finals = train(engine, cls, **settings)
        found[name] = [len(taken), max(map(difference, expected, finals))]
        taken.clear()
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    os._exit(0)  # gloo can hang when a process group is torn down


if __name__ == "__main__":
    main(sys.argv[1])
