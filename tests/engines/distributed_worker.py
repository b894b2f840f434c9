"""One rank of test_distributed.py: train a model together, and the same model on all data in this process alone.

Usage: distributed_worker.py PROCESSES ENGINE…  Rank 0 prints, as JSON, for every engine and setting the largest
relative difference of a parameter; for "fsdp1" what each variant says to it.
"""

import contextlib
import copy
import functools
import json
import os
import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType
from accelerate_helpers import let_accelerate_shard_on_cpus
from helpers import METHODS, make
from meshes import mesh_of
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

STEPS, BATCH = 8, 8
RESUMED = 4  # steps after which a new model and optimizer go on from the state dicts of the old ones
OPTIONS = {"clipped": {}, "unclipped": {"max_norm": None}, "exact": {"exact": True}}


def make_model():
    """Tall, wide and square matrices; 5 and 3 rows do not divide by two, and one shard of the last bias is empty."""
    torch.manual_seed(0)
    layers = [nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 5), nn.Linear(5, 3)]
    return nn.Sequential(*layers, nn.Linear(3, 1)).double()


# Weights are Shard(0), Shard(1), Shard(0) with uneven shards; the others know nothing of tensor parallelism.
TENSOR_PARALLEL = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(output_layouts=Replicate())}


def wrap(engine, model, size):
    """The model under ``engine`` on all ``size`` processes, and how many ranks share a batch's rows."""
    if engine.startswith("ddp"):
        return DistributedDataParallel(model, gradient_as_bucket_view=engine == "ddp_bucket_view"), size
    if engine == "fsdp2":
        fully_shard(model, mesh=mesh_of("cpu", (size,)))
    elif engine == "hsdp":
        fully_shard(model, mesh=mesh_of("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard")))
    elif engine == "tensor_parallel":
        parallelize_module(model, mesh_of("cpu", (size,), mesh_dim_names=("tp",)), TENSOR_PARALLEL)
        check_tensor_parallel(model, size)
        return model, 1
    elif engine == "fsdp2_tensor_parallel":
        mesh = mesh_of("cpu", (2, size // 2), mesh_dim_names=("shard", "tp"))
        parallelize_module(model, mesh["tp"], TENSOR_PARALLEL)
        fully_shard(model, mesh=mesh["shard"])
        assert all(isinstance(p, DTensor) and "shard" in p.device_mesh.mesh_dim_names for p in model.parameters())
        check_tensor_parallel(model, size)
        return model, 2
    check_sharded(model, size)
    return model, size


def check_sharded(model, size):
    assert all(isinstance(p, DTensor) and p.device_mesh.size() == size for p in model.parameters())


def check_tensor_parallel(model, size):
    for name, dim in {"0": 0, "2": 1, "4": 0}.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, DTensor) and weight.device_mesh.size() == size, name
        assert weight.device_mesh.mesh_dim_names[-1] == "tp" and weight.placements[-1] == Shard(dim), name


def prepare(model, optimizer):
    """FSDP2 by accelerate, which puts its own parameters into an optimizer that was made of the whole ones."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    assert accelerator.distributed_type == DistributedType.FSDP, accelerator.distributed_type
    model, optimizer = accelerator.prepare(model, optimizer)
    check_sharded(model, accelerator.num_processes)
    return model, optimizer.optimizer


def train(model, optimizer, inputs, targets, rows, *, set_to_none, micro_batches=1, first=0):
    clipped_steps = 0
    for t, (x, y) in enumerate(zip(inputs[first:], targets[first:], strict=True), first):

        def backward(x=x[rows], y=y[rows], scale=0.01 * 3**t):  # clipping sets in on the way
            for i, (x_i, y_i) in enumerate(zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True)):
                with contextlib.nullcontext() if i == micro_batches - 1 else model.no_sync():
                    (scale / micro_batches * ((model(x_i) - y_i) ** 2).mean()).backward()

        def evaluate(x=x[rows]):  # FSDP2 keeps what it has gathered for it
            with torch.no_grad():
                model(x)

        evaluate()
        if optimizer.param_groups[0]["exact"]:
            with optimizer.previous_point():
                backward()
                evaluate()
        backward()
        norms = [p.grad.norm() for p in optimizer.param_groups[0]["params"]]
        clipped_steps += max((n.full_tensor() if isinstance(n, DTensor) else n).item() for n in norms) > 1.5
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    return clipped_steps


def largest_error(engine, make_optimizer, inputs, targets):
    alone = make_model()
    clipped_steps = train(alone, make_optimizer(alone.parameters()), inputs, targets, slice(None), set_to_none=True)
    assert 0 < clipped_steps < STEPS, clipped_steps
    model = make_model()
    if engine == "fsdp2_accelerate":
        parts = dist.get_world_size()
        wrapped, optimizer = prepare(model, make_optimizer(model.parameters()))
    else:
        wrapped, parts = wrap(engine, model, dist.get_world_size())
        optimizer = make_optimizer(model.parameters())
    part = dist.get_rank() * parts // dist.get_world_size()
    rows = slice(part * BATCH // parts, (part + 1) * BATCH // parts)
    how = {
        # Reused gradient memory is DDP's trap; bucket views stay views only if they are zeroed in place.
        "set_to_none": engine != "ddp_bucket_view",
        "micro_batches": 2 if engine == "ddp_no_sync" else 1,
    }
    train(wrapped, optimizer, inputs[:RESUMED], targets[:RESUMED], rows, **how)
    if engine != "fsdp2_accelerate":  # whose checkpoints are the Trainer's
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        model = make_model()
        wrapped, _ = wrap(engine, model, dist.get_world_size())
        optimizer = make_optimizer(model.parameters())
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    train(wrapped, optimizer, inputs, targets, rows, first=RESUMED, **how)
    keys = [sorted(optimizer.state[p]) for p in model.parameters()]
    everyones_keys = [None] * dist.get_world_size()
    dist.all_gather_object(everyones_keys, keys)
    assert all(keys == everyones_keys[0] for keys in everyones_keys)
    error = 0.0
    for a, b in zip(alone.parameters(), model.parameters(), strict=True):
        b = b.full_tensor() if isinstance(b, DTensor) else b
        error = max(error, ((a - b).abs().max() / a.abs().max()).item())
    return error


def refusals():
    """What the variants say to FSDP1's parameters, flat ones and slices of flat ones."""
    messages = {}
    for use_orig_params in (False, True):
        model = FullyShardedDataParallel(make_model(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        for method, (cls, keywords, _) in METHODS.items():
            for option, settings in OPTIONS.items():
                try:
                    cls(model.parameters(), **keywords, **settings)
                except ValueError as error:
                    messages[f"{method} {option} {use_orig_params}"] = str(error)
    return messages


def main(processes, engines):
    torch.set_num_threads(1)
    let_accelerate_shard_on_cpus()
    dist.init_process_group("gloo")
    assert dist.get_world_size() == processes
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(STEPS, BATCH, 7, generator=generator, dtype=torch.float64)
    targets = torch.randn(STEPS, BATCH, 1, generator=generator, dtype=torch.float64)
    errors = {
        engine: refusals()
        if engine == "fsdp1"
        else {
            f"{method} {option}": largest_error(
                engine, functools.partial(make, method, weight_decay=0.1, **settings), inputs, targets
            )
            for method in METHODS
            for option, settings in OPTIONS.items()
        }
        for engine in engines
    }
    if dist.get_rank() == 0:
        print(json.dumps(errors), flush=True)
    dist.barrier()
    os._exit(0)  # gloo can hang when a process group is torn down after DDP


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
