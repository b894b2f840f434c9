"""One rank of test_skipping.py: train with and without steps whose gradient is not finite in one process alone.

Usage: skipping_worker.py ENGINE…  Rank 0 prints, as JSON, for every engine and case whether all ranks ended with equal
parameters and states, and how many steps each skipped.
"""

import json
import math
import os
import sys

import torch
import torch.distributed as dist
from distributed_worker import BATCH, make_model, wrap
from helpers import METHODS, make
from torch.distributed.tensor import DTensor

from hf_mars.optim import skipping
from hf_mars.optim.kernels import cpu

STEPS = 4
BAD = (1, 1, 3)  # before these steps
WAYS = {"told": {"max_norm": None}, "option": {"max_norm": None, "skip_nonfinite": True}, "clip": {"max_norm": 0.5}}
CASES = [(method, way, False) for method in METHODS for way in WAYS] + [(method, "told", True) for method in METHODS]


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def train(engine, method, way, exact, bad_steps):
    torch.manual_seed(1)
    inputs, targets = torch.randn(STEPS, BATCH, 7).double(), torch.randn(STEPS, BATCH, 1).double()
    model, parts = wrap(engine, make_model(), dist.get_world_size())
    params = list(model.parameters())
    optimizer = make(method, params, gamma=0.3, exact=exact, **WAYS[way])
    part = dist.get_rank() * parts // dist.get_world_size()
    rows = slice(part * BATCH // parts, (part + 1) * BATCH // parts)
    for t in range(STEPS):
        for is_bad in [True] * bad_steps.count(t) + [False]:
            x = inputs[t][rows].clone()
            if is_bad and dist.get_rank() == dist.get_world_size() - 1:
                x[0, 0] = math.nan
            norms = []
            for context in [optimizer.previous_point()] * exact + [None]:
                if context is None:
                    ((model(x) - targets[t][rows]) ** 2).mean().backward()
                    norms += [p.grad.norm() for p in params]
                    continue
                with context:
                    ((model(x) - targets[t][rows]) ** 2).mean().backward()
                    norms += [p.grad.norm() for p in params]
            if way == "told":
                optimizer.skip_unless_finite(*norms)
            optimizer.step()
            optimizer.zero_grad()
    tensors = [local(p.detach()) for p in params]
    tensors += [local(value) for p in params for value in optimizer.state[p].values()]
    return tensors, optimizer.skipped_steps


def outcome(engine, *case):
    (without, none), (with_bad, skipped) = train(engine, *case, ()), train(engine, *case, BAD)
    same = len(without) == len(with_bad) and all(torch.equal(a, b) for a, b in zip(without, with_bad, strict=True))
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (same, none, skipped))
    return everyone


if __name__ == "__main__":
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    results = {}
    for name in sys.argv[1:]:
        for case in CASES:
            results[f"{name} {case}"] = outcome(name, *case)
    # As on accelerators: no host reads a norm.
    skipping.reads_are_free, cpu._cpu = lambda tensors: False, None
    for name in sys.argv[1:]:
        for case in CASES:
            results[f"{name} {case} on the device"] = outcome(name, *case)
    if dist.get_rank() == 0:
        print(json.dumps(results))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
