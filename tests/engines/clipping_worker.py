"""One rank of test_clipping_in_engines.py: steps that take the clip along, beside gradients multiplied first.

Usage: clipping_worker.py ENGINE…  Rank 0 prints, as JSON, for every engine, method and max_norm: whether all ranks
ended with equal parameters and states both ways, the factors, the largest relative error of the total norm beside that
of all data in one process, and what has taken the steps of matrices.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from distributed_worker import BATCH, make_model, wrap
from helpers import make
from skipping_worker import local

STEPS = 5
CASES = [
    (method, max_norm, dtype)
    for method in ("mars_adamw", "mars_lion", "mars_shampoo")
    for max_norm in (None, 0.05)
    for dtype in ("float32", "bfloat16")
]


def data(dtype):
    torch.manual_seed(1)
    return torch.randn(STEPS, BATCH, 7).to(dtype), torch.randn(STEPS, BATCH, 1).to(dtype)


def loss_of(model, x, y, t):
    return 10.0 ** (t % 3 - 2) * ((model(x) - y) ** 2).mean()


def train(engine, method, max_norm, dtype, fused):
    dtype = getattr(torch, dtype)
    inputs, targets = data(dtype)
    model, parts = wrap(engine, make_model().to(dtype), dist.get_world_size())
    alone = make_model().to(dtype)
    params = list(model.parameters())
    optimizer = make(method, params, gamma=0.3, max_norm=max_norm)
    part = dist.get_rank() * parts // dist.get_world_size()
    rows = slice(part * BATCH // parts, (part + 1) * BATCH // parts)
    factors, errors = [], []
    for t, (x, y) in enumerate(zip(inputs, targets, strict=True)):
        loss_of(model, x[rows], y[rows], t).backward()
        norm = optimizer.clip_grad_norm_(0.1)
        factors.append(torch.clamp(0.1 / (norm + 1e-6), max=1.0))
        if t == 0:
            loss_of(alone, x, y, t).backward()
            expected = sum(p.grad.double().square().sum() for p in alone.parameters()).sqrt()
            errors.append(abs(norm.item() / expected.item() - 1))
        if not fused:
            optimizer.global_clip.forget()
            for p in params:
                local(p.grad).mul_(factors[-1])
        optimizer.step()
        optimizer.zero_grad()
    tensors = [local(p.detach()) for p in params]
    tensors += [local(value) for p in params for value in optimizer.state[p].values()]
    return tensors, [factor.item() for factor in factors], max(errors), optimizer.executions["matrix"]


def outcome(engine, *case):
    (one, factors, error, execution), (two, *_) = train(engine, *case, True), train(engine, *case, False)
    same = len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (same, factors, error, execution))
    return everyone


if __name__ == "__main__":
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    results = {f"{name} {case}": outcome(name, *case) for name in sys.argv[1:] for case in CASES}
    if dist.get_rank() == 0:
        print(json.dumps(results))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
