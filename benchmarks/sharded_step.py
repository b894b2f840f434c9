"""Time of a MARS-Shampoo step on several processes: work on whole matrices shared among ranks, and not.

    torchrun --standalone --nproc_per_node 2 benchmarks/sharded_step.py

The hidden matrices of some layers of GPT-2 small, float32, replicated (DDP) or sharded by rows (FSDP2); one thread a
process. The ways take turns; medians. Gloo on CPUs; NCCL where there is a GPU for every process.
"""

import argparse
import os
import statistics
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hf_mars import MarsShampoo
from hf_mars.optim.sharding import matrices as sharding


def make(shapes, mesh, process_group):
    torch.manual_seed(0)
    tensors = [torch.randn(shape, device=mesh.device_type) for shape in shapes]
    if process_group is None:
        tensors = [distribute_tensor(t, mesh, [Shard(0)]) for t in tensors]
    params = [torch.nn.Parameter(t) for t in tensors]
    for param in params:
        param.grad = 1e-4 * torch.ones_like(param)
    return MarsShampoo(params, process_group=process_group)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    on_gpu = torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        torch.cuda.set_device(dist.get_rank())
    torch.set_num_threads(1)
    mesh = init_device_mesh("cuda" if on_gpu else "cpu", (dist.get_world_size(),))
    width = arguments.width
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * arguments.layers
    shared_way = sharding._way
    ways = {
        "replicated, every rank does everything": (dist.group.WORLD, lambda *_: (sharding._on_every_rank,)),
        "replicated, shared": (dist.group.WORLD, shared_way),
        "sharded, gathered on every rank": (None, lambda *_: (sharding._on_gathered,)),
        "sharded, each matrix on one rank": (None, shared_way),
    }
    optimizers = {name: make(shapes, mesh, group) for name, (group, _) in ways.items()}
    seconds = {name: [] for name in ways}
    for t in range(arguments.steps + 1):
        for name, (_, way) in ways.items():
            sharding._way = way
            dist.barrier()
            start = time.perf_counter()
            optimizers[name].step()
            if on_gpu:
                torch.cuda.synchronize()
            dist.barrier()
            if t > 0:
                seconds[name].append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        device = torch.cuda.get_device_name() if on_gpu else "CPU, one thread per process"
        print(f"torch {torch.__version__}, {dist.get_world_size()} processes, {device}, {len(shapes)} matrices")
        print("\n| way | ms per step |\n| --- | --- |")
        for name, values in seconds.items():
            print(f"| {name} | {1e3 * statistics.median(values):.0f} |")
    dist.barrier()
    os._exit(0)  # gloo can hang when a process group is torn down


if __name__ == "__main__":
    main()
