"""A step on several processes: work on whole matrices shared among ranks, and shards in the compiled kernels, or not.

    torchrun --standalone --nproc_per_node 2 benchmarks/sharded_step.py

The hidden matrices of some layers of GPT-2 small, float32, replicated (DDP) or sharded by rows (FSDP2); one thread per
process. The ways take turns; medians. Gloo on CPUs; NCCL where there is a GPU for every process. "Sent" is what a rank
gives to collective operations, "alone" the time of these without the work between them, "launches" are calls of
torch's operators, "extra peak" is what a step allocates.
"""

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from step_time import Memory
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_mars import MarsAdamW, MarsShampoo
from hf_mars.optim import composed
from hf_mars.optim.kernels import cpu, gpu
from hf_mars.optim.sharding import matrices


class Way(NamedTuple):
    make: Callable  # an optimizer of parameters
    is_sharded: bool
    replaced: dict  # (module, name) -> what stands there meanwhile


FLOAT32 = {(matrices, "all_ranks_can"): lambda *_: False, (composed, "ORTHOGONALISED_AT_A_TIME"): 1 << 62}
COMPOSED = {
    (cpu, "why_not"): lambda batch: "the benchmark asks for it",
    (gpu, "split"): lambda batch: (None, batch, "the benchmark asks for it"),
}


def shampoo(params):
    return MarsShampoo(params, process_group=dist.group.WORLD)


def clipped(params):
    return MarsAdamW(params, max_norm=1.0)


WAYS = {
    "MarsShampoo, replicated: every rank does everything": Way(MarsShampoo, False, {}),
    "MarsShampoo, replicated: shared, float32 sent, all at once": Way(shampoo, False, FLOAT32),
    "MarsShampoo, replicated: shared": Way(shampoo, False, {}),
    "MarsShampoo, sharded: gathered on every rank": Way(
        MarsShampoo, True, {(matrices, "_way"): lambda *_: (matrices._on_gathered,)}
    ),
    "MarsShampoo, sharded: each matrix on one rank, float32 sent, all at once": Way(MarsShampoo, True, FLOAT32),
    "MarsShampoo, sharded: each matrix on one rank": Way(MarsShampoo, True, {}),
    "MarsAdamW with the clip, sharded: composed": Way(clipped, True, COMPOSED),
    "MarsAdamW with the clip, sharded: in the compiled step or the kernels": Way(clipped, True, {}),
    "MarsAdamW, sharded: composed": Way(MarsAdamW, True, COMPOSED),
    "MarsAdamW, sharded: in the compiled step or the kernels": Way(MarsAdamW, True, {}),
}


class Launches(TorchDispatchMode):
    """Counts calls of torch's operators inside the context."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += 1
        return function(*arguments, **(keywords or {}))


class Sent:
    """What this rank gives to collective operations inside `recorded`."""

    def __init__(self):
        self.bytes = 0
        self._calls = []

    @contextlib.contextmanager
    def recorded(self):
        with contextlib.ExitStack() as stack:
            for name in ("all_reduce", "all_to_all_single", "all_gather_into_tensor", "broadcast"):
                stack.enter_context(mock.patch.object(dist, name, self._recording(name, getattr(dist, name))))
            yield

    def _recording(self, name, original):
        def record(*args, **keywords):
            given = args[0] if name in ("all_reduce", "broadcast") else args[1]
            if name != "broadcast" or args[1] == dist.get_rank():
                self.bytes += given.nbytes
            self._calls.append((original, args, keywords))
            return original(*args, **keywords)

        return record

    def seconds(self):
        """Of the same operations with nothing between them: what their overlap with work could save at most."""
        dist.barrier()
        start = time.perf_counter()
        for work in [function(*args, **keywords) for function, args, keywords in self._calls]:
            if work is not None:
                work.wait()
        dist.barrier()
        return time.perf_counter() - start


@contextlib.contextmanager
def replaced(replacements):
    with contextlib.ExitStack() as stack:
        for (module, name), value in replacements.items():
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def make(way, shapes, mesh):
    torch.manual_seed(0)
    tensors = [torch.randn(shape, device=mesh.device_type) for shape in shapes]
    if way.is_sharded:
        tensors = [distribute_tensor(t, mesh, [Shard(0)]) for t in tensors]
    return way.make([{"params": [torch.nn.Parameter(tensor) for tensor in tensors], "kind": "matrix"}])


def new_gradients(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = 1e-4 * torch.ones_like(param)


def counts_of(optimizer, device):
    """Bytes sent and the seconds that takes, launches and the extra peak of one step, each in a step of its own."""
    new_gradients(optimizer)
    sent = Sent()
    with sent.recorded():
        optimizer.step()
    seconds = min(sent.seconds() for _ in range(3))
    new_gradients(optimizer)
    with Launches() as launches:
        optimizer.step()
    new_gradients(optimizer)
    with Memory(device) as memory:
        optimizer.step()
    return sent.bytes, seconds, launches.count, max(0, memory.peak)


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
    device = torch.device("cuda" if on_gpu else "cpu")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    width = arguments.width
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * arguments.layers
    optimizers = {name: make(way, shapes, mesh) for name, way in WAYS.items()}
    seconds = {name: [] for name in WAYS}
    for t in range(arguments.steps + 1):
        for name, way in WAYS.items():
            with replaced(way.replaced):
                new_gradients(optimizers[name])
                dist.barrier()
                start = time.perf_counter()
                optimizers[name].step()
                if on_gpu:
                    torch.cuda.synchronize()
                dist.barrier()
            if t > 0:
                seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, way in WAYS.items():
        with replaced(way.replaced):
            sent, exchange, launches, peak = counts_of(optimizers[name], device)
        elements = sum(torch.Size(shape).numel() for shape in shapes)
        milliseconds = 1e3 * statistics.median(seconds[name])
        sent = f"{sent / 1e6:.1f}, {1e3 * exchange:.0f}"
        rows.append(f"| {name} | {milliseconds:.0f} | {sent} | {launches} | {peak / elements:.1f} |")
    if dist.get_rank() == 0:
        where = torch.cuda.get_device_name() if on_gpu else "CPU, one thread per process"
        print(f"torch {torch.__version__}, {dist.get_world_size()} processes, {where}, {len(shapes)} matrices\n")
        print("| way | ms per step | MB sent by a rank, ms alone | launches | extra peak, bytes per parameter |")
        print("| --- | --- | --- | --- | --- |")
        print("\n".join(rows))
    dist.barrier()
    os._exit(0)  # gloo can hang when a process group is torn down


if __name__ == "__main__":
    main()
