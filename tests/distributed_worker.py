"""One rank of tests/test_distributed.py: train a model on this rank's half of each batch, and the same model on all of
it in this process alone; print the largest relative difference of a parameter, per setting, as JSON on rank 0."""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_mars.optim import MarsAdamW, MarsLion, MarsShampoo

STEPS, BATCH = 12, 8
METHODS = {
    "mars_adamw": (MarsAdamW, {}),
    "mars_lion": (MarsLion, {}),
    "mars_shampoo": (MarsShampoo, {}),
    "mars_m": (MarsShampoo, {"adjust_lr_fn": "match_rms_adamw"}),
}
OPTIONS = {"clipped": {}, "unclipped": {"max_norm": None}, "exact": {"exact": True}}


def make_model():
    """Tall, wide and square matrices; 5 and 3 rows do not divide by two, and one shard of the last bias is empty."""
    torch.manual_seed(0)
    layers = [nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 5), nn.Linear(5, 3)]
    return nn.Sequential(*layers, nn.Linear(3, 1)).double()


def wrap(engine, model, mesh):
    if engine == "fsdp2":
        fully_shard(model, mesh=mesh)
        assert all(isinstance(p, DTensor) and p.device_mesh.size() == 2 for p in model.parameters())
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=engine == "ddp_bucket_view")


def train(model, optimizer, inputs, targets, rows, *, set_to_none):
    clipped_steps = 0
    for t, (x, y) in enumerate(zip(inputs, targets, strict=True)):

        def backward(x=x[rows], y=y[rows], scale=0.01 * 2**t):  # clipping sets in on the way
            (scale * ((model(x) - y) ** 2).mean()).backward()

        if optimizer.param_groups[0]["exact"]:
            with optimizer.previous_point():
                backward()
        backward()
        norms = [p.grad.norm() for p in optimizer.param_groups[0]["params"]]
        clipped_steps += max((n.full_tensor() if isinstance(n, DTensor) else n).item() for n in norms) > 1.5
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    return clipped_steps


def main(engine):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    assert dist.get_world_size() == 2
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(STEPS, BATCH, 7, generator=generator, dtype=torch.float64)
    targets = torch.randn(STEPS, BATCH, 1, generator=generator, dtype=torch.float64)
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    errors = {}
    for method, (cls, keywords) in METHODS.items():
        for option, settings in OPTIONS.items():
            arguments = {"lr": 0.02, "weight_decay": 0.1, **keywords, **settings}
            alone = make_model()
            optimizer = cls(alone.parameters(), **arguments)
            clipped_steps = train(alone, optimizer, inputs, targets, slice(None), set_to_none=True)
            assert 0 < clipped_steps < STEPS, clipped_steps
            model = make_model()
            wrapped = wrap(engine, model, mesh)
            # Reused gradient memory is DDP's trap; bucket views stay views only if they are zeroed in place.
            optimizer = cls(model.parameters(), **arguments)
            train(wrapped, optimizer, inputs, targets, half, set_to_none=engine != "ddp_bucket_view")
            keys = [sorted(optimizer.state[p]) for p in model.parameters()]
            everyones_keys = [None, None]
            dist.all_gather_object(everyones_keys, keys)
            assert everyones_keys[0] == everyones_keys[1]
            error = 0.0
            for a, b in zip(alone.parameters(), model.parameters(), strict=True):
                b = b.full_tensor() if isinstance(b, DTensor) else b
                error = max(error, ((a - b).abs().max() / a.abs().max()).item())
            errors[f"{method} {option}"] = error
    if rank == 0:
        print(json.dumps(errors), flush=True)
    dist.barrier()
    os._exit(0)  # gloo can hang when a process group is torn down after DDP


if __name__ == "__main__":
    main(sys.argv[1])
