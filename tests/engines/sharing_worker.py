"""One rank of test_sharing.py: work on whole matrices shared among ranks, and the messages that a step sends."""

import collections
import datetime
import json
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_mars.optim import MarsAdamW, MarsLion, MarsShampoo, composed
from hf_mars.optim.algorithm import newton_schulz
from hf_mars.optim.sharding import WHOLE, all_ranks_can, norms_of_wholes, on_whole_matrices, part_of
from hf_mars.optim.sharding import matrices as sharding

SHAPES = [(7, 4), (4, 7), (5, 5), (1, 3), (3, 1), (2, 3, 4), (6, 2)]


class Messages:
    """Counts what is sent inside the context."""

    NAMES = ("all_reduce", "all_to_all_single", "broadcast")

    def __enter__(self):
        self.counts, self.bytes = collections.Counter(), collections.Counter()
        self.originals = {name: getattr(dist, name) for name in self.NAMES}
        for name, original in self.originals.items():

            def counted(*args, name=name, original=original, **kwargs):
                self.counts[name] += 1
                self.bytes[name] += args[0].nbytes
                return original(*args, **kwargs)

            setattr(dist, name, counted)
        return self

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(dist, name, original)


def layouts(world):
    flat = init_device_mesh("cpu", (world,))
    grid = init_device_mesh("cpu", (2, world // 2))
    return {
        "rows": (flat, [Shard(0)]),
        "columns": (flat, [Shard(1)]),
        "replicated": (flat, [Replicate()]),
        "hybrid": (grid, [Replicate(), Shard(0)]),
        "both": (grid, [Shard(0), Shard(1)]),
    }


def check_functions(world, found):
    torch.manual_seed(0)  # the same matrices on every rank
    matrices = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]

    def work(tensors):
        found["worked on"] = found.get("worked on", 0) + len(tensors)
        return [t * t.sum() + 1 for t in tensors]  # needs the whole

    expected = work(matrices)
    shared = on_whole_matrices(work, matrices, [WHOLE] * len(matrices), dist.group.WORLD)
    assert all(torch.equal(a, b) for a, b in zip(shared, expected, strict=True))
    for name, (mesh, placements) in layouts(world).items():
        params = [distribute_tensor(m, mesh, placements) for m in matrices]
        parts = [part_of(p) for p in params]
        tensors = [part.of(p) for part, p in zip(parts, params, strict=True)]
        found["worked on"] = 0
        results = on_whole_matrices(work, tensors, parts, None)
        mine = torch.tensor(found["worked on"])
        dist.all_reduce(mine)
        found[f"{name}: worked on by all ranks"] = mine.item()
        for result, e in zip(results, expected, strict=True):
            whole = DTensor.from_local(
                result.contiguous(), mesh, placements, run_check=False, shape=e.shape, stride=e.stride()
            ).full_tensor()
            assert torch.allclose(whole, e, rtol=1e-12), (name, e.shape)
        with Messages() as messages:
            measured = norms_of_wholes(tensors, parts)
        found[f"{name}: reductions"] = messages.counts["all_reduce"]
        for value, m in zip(measured, matrices, strict=True):
            assert torch.allclose(value, m.norm(), rtol=1e-12), (name, m.shape)


def gradients(model, t):
    generator = torch.Generator().manual_seed(t)
    return [3 * torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in model.parameters()]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in ((7, 16), (16, 16), (16, 5), (5, 3)))).double()


def check_optimizers(world, found):
    """Whole steps: sharing changes nothing, and a step sends one reduction and two exchanges whatever the model."""
    finals = []
    for process_group in (None, dist.group.WORLD):
        model = make_model()
        optimizer = MarsShampoo(model.parameters(), max_norm=1.0, process_group=process_group)
        for t in range(3):
            for p, g in zip(model.parameters(), gradients(model, t), strict=True):
                p.grad = g
            with Messages() as messages:
                optimizer.step()
        finals.append([p.detach() for p in model.parameters()])
    found["replicas: messages a step"] = dict(messages.counts)
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))
    for cls in (MarsAdamW, MarsShampoo):
        model = make_model()
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        optimizer = cls(model.parameters(), max_norm=1.0, optimize_1d=cls is MarsAdamW)
        for t in range(2):
            for p, g in zip(model.parameters(), gradients(make_model(), t), strict=True):
                p.grad = distribute_tensor(g, p.device_mesh, p.placements)
            with Messages() as messages:
                optimizer.step()
        found[f"sharded {cls.__name__}: messages a step"] = dict(messages.counts)


def check_pieces(world):
    """Parameters that are updated in copies, piece by piece: ranks with uneven parts must cut alike, or they would
    wait for each other's reductions forever."""
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    values = [torch.randn(shape, dtype=torch.bfloat16) for shape in ((3, 8), (2, 8), (5, 8), (8, 5))]
    slopes = [[torch.randn_like(v) for v in values] for _ in range(3)]
    before, composed.COPIED_AT_A_TIME = composed.COPIED_AT_A_TIME, 20
    for cls in (MarsAdamW, MarsLion, MarsShampoo):
        finals = []
        for place in (torch.clone, lambda v: distribute_tensor(v, mesh, [Shard(0)])):
            params = [nn.Parameter(place(v)) for v in values]
            optimizer = cls(params, lr=0.1, max_norm=1.0)
            for step in slopes:
                for p, g in zip(params, step, strict=True):
                    p.grad = place(g)
                optimizer.step()
            finals.append([p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in params])
        for one, several in zip(*finals, strict=True):
            assert torch.allclose(one, several, rtol=2**-6, atol=2**-6), cls
    composed.COPIED_AT_A_TIME = before


def check_bfloat16(world, found):
    """Where Newton–Schulz computes in bfloat16 that is sent: half the bytes, the same bits; stack by stack, too."""
    newton_schulz.CPU_HAS_BFLOAT16_UNITS, newton_schulz.MIN_BFLOAT16 = True, 16
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (world,))
    matrices = [torch.randn(shape) for shape in ((32, 48), (64, 16), (17, 33), (8, 8))]
    slopes = [[torch.randn_like(m) for m in matrices] for _ in range(2)]
    places = {
        "sharded": (lambda v: distribute_tensor(v, mesh, [Shard(0)]), None),
        "replicated": (torch.clone, dist.group.WORLD),
    }
    for name, (place, group) in places.items():
        finals, sent = [], []
        for ask, at_a_time in ((all_ranks_can, 1 << 26), (lambda *_: False, 1 << 26), (all_ranks_can, 1)):
            sharding.all_ranks_can = ask
            composed.ORTHOGONALISED_AT_A_TIME = at_a_time
            params = [nn.Parameter(place(m)) for m in matrices]
            optimizer = MarsShampoo(params, process_group=group)
            with Messages() as messages:
                for step in slopes:
                    for p, g in zip(params, step, strict=True):
                        p.grad = place(g)
                    optimizer.step()
            finals.append([p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in params])
            of_all = torch.tensor(messages.bytes["all_to_all_single"] + messages.bytes["broadcast"])
            dist.all_reduce(of_all)
            sent.append(int(of_all))
        for whole, halved, in_pieces in zip(*finals, strict=True):
            assert torch.equal(whole, halved) and torch.allclose(whole, in_pieces, rtol=1e-2, atol=1e-3), name
        found[f"{name}: bytes in bfloat16, in float32"] = sent[:2]


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    found = {}
    check_functions(dist.get_world_size(), found)
    check_optimizers(dist.get_world_size(), found)
    check_pieces(dist.get_world_size())
    check_bfloat16(dist.get_world_size(), found)
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    os._exit(0)  # gloo can hang when a process group is torn down


if __name__ == "__main__":
    main()
