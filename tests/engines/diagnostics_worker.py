"""One rank of tests/trainer/test_diagnostics.py: step_diagnostics of a sharded model and of the whole one, as JSON."""

import json
import os

import torch
import torch.distributed as dist
from distributed_worker import make_model, wrap

from hf_mars.optim import MarsAdamW
from hf_mars.optim.diagnostics import step_diagnostics


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    x = torch.randn(2, 8, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for engine in (None, "fsdp2"):
        model = make_model()
        wrapped = model if engine is None else wrap(engine, model, 2)[0]
        optimizer = MarsAdamW(model.parameters(), max_norm=0.6)
        for batch in x:
            optimizer.zero_grad()
            (wrapped(batch) ** 2).mean().backward()
            measured = step_diagnostics(optimizer)
            optimizer.step()
        results.append(measured)
    if dist.get_rank() == 0:
        print(json.dumps(results), flush=True)
    dist.barrier()
    os._exit(0)  # gloo can hang when a process group is torn down after DDP


if __name__ == "__main__":
    main()
