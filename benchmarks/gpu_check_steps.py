"""Parts of gpu_check.py: what must come out right whatever the order of work on the device, and at any size."""

from __future__ import annotations

import contextlib
import random
import warnings

import torch

from hf_mars import MarsAdamW, MarsLion, MarsShampoo
from hf_mars.optim.kernels import gpu, plan

SHAPES = [(50, 90), (1, 1), (64, 64), (3, 7), (4097, 5), (33, 2, 8), (7,), (900, 300)]
TINY_SHAPES = [(50, 90), (1, 1), (3, 7), (7,)]
METHODS = {
    "MarsAdamW": lambda params, **settings: MarsAdamW(params, **settings),
    "MarsAdamW(max_norm=1)": lambda params, **settings: MarsAdamW(params, max_norm=1.0, **settings),
    "MarsLion(max_norm=1)": lambda params, **settings: MarsLion(params, max_norm=1.0, **settings),
    "MarsShampoo": lambda params, **settings: shampoo(params, **settings),
}


def shampoo(params, **settings):
    """All matrices are hidden ones here."""
    matrices = [param for param in params if param.ndim > 1]
    vectors = [param for param in params if param.ndim <= 1]
    groups = [{"params": matrices, "kind": "matrix"}, {"params": vectors, "kind": "1d"}]
    return MarsShampoo([group for group in groups if group["params"]], **settings)


def order(report, seconds):
    shapes, steps = (TINY_SHAPES, 6) if report.is_tiny else (SHAPES, 200)
    for name, make in METHODS.items():
        synchronised = random_subsets(make, shapes, steps, report.device, streams=False)
        overlapped = random_subsets(make, shapes, steps, report.device, streams=True)
        equal = all(torch.equal(a, b) for a, b in zip(synchronised, overlapped, strict=True))
        finite = all(bool(t.isfinite().all()) for t in overlapped)
        report.check(f"{name}, {steps} steps of random subsets on two streams", equal and finite, "bit for bit")
    for name, make in METHODS.items():
        error = replays(make, shapes, report.device)
        limit = 2e-2 if "Shampoo" in name else 1e-5  # bfloat16 products are not rounded alike in other surroundings
        what = "10 replays" if report.device.type == "cuda" else "10 steps with a tensor for lr (no graphs here)"
        report.check(f"{name}, {what}", error <= limit, f"relative error {error:.1e}")
    default = torch.get_default_dtype()
    gpu.kernels_for.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kernels = gpu.kernels_for(report.device)
    finally:
        torch.set_default_dtype(default)
    said = "; ".join(str(warning.message) for warning in caught)
    report.check("default dtype bfloat16", kernels is not None and not caught, said or "no warnings")


def parameters(shapes, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def random_subsets(make, shapes, steps, device, streams):
    """Final parameters. With `streams`, backward passes and steps alternate between two, which wait for each other."""
    params = parameters(shapes, device)
    optimizer = make(params, lr=1e-3)
    chooser = random.Random(0)
    two = [torch.cuda.Stream(device), torch.cuda.Stream(device)] if streams and device.type == "cuda" else []
    for t in range(steps):
        chosen = [i for i in range(len(params)) if chooser.random() < 0.7]
        scale = chooser.choice([1e-4, 0.02, 1.0])
        with contextlib.ExitStack() as stack:
            if two:
                current, other = two[t % 2], two[(t + 1) % 2]
                current.wait_stream(other if t else torch.cuda.current_stream(device))
                stack.enter_context(torch.cuda.stream(current))
            optimizer.zero_grad()
            for i in chosen:
                generator = torch.Generator(device=device).manual_seed(1000 * t + i)
                params[i].grad = scale * torch.randn(params[i].shape, generator=generator, device=device)
            optimizer.step()
        if not two and device.type == "cuda":
            torch.cuda.synchronize(device)
    if two:
        torch.cuda.synchronize(device)
    return [p.detach().clone() for p in params]


def replays(make, shapes, device):
    """Largest relative difference of ten replays of a captured step to ten steps, with other gradients and lr each."""
    finals = []
    for captured in (False, True):
        params = parameters(shapes, device)
        lr = torch.zeros((), device=device) if captured else 0.0
        optimizer = make(params, lr=lr)
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()  # makes the states
        graph = torch.cuda.CUDAGraph() if captured and device.type == "cuda" else None
        if graph is not None:
            torch.cuda.synchronize(device)
            with torch.cuda.graph(graph):
                optimizer.step()
        for t in range(10):
            for group in optimizer.param_groups:
                group["lr"].fill_(1e-3 * (t + 1)) if captured else group.update(lr=1e-3 * (t + 1))
            for i, param in enumerate(params):
                generator = torch.Generator(device=device).manual_seed(100 * t + i)
                param.grad.copy_(0.3**t * torch.randn(param.shape, generator=generator, device=device))
            graph.replay() if graph is not None else optimizer.step()
        finals.append([p.detach().clone() for p in params])
    differences = [((a - b).norm() / b.norm()).item() for a, b in zip(*finals, strict=True)]
    return max(differences)


def large(report, seconds):
    """One tensor of more elements than an int32 counts: its ends are those of small tensors of the same values."""
    edge = 4097
    n = 3 * plan.BLOCK + edge if report.is_tiny else 2**31 + edge
    if report.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(report.device)
        if free < 14 * n:
            report.info(f"{n:,} elements", f"left out: needs {14 * n / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
            return
    results = []
    generator = torch.Generator().manual_seed(0)
    ends = {at: torch.randn(3, edge, generator=generator) for at in ("first", "last")}
    for is_whole in (True, False):
        places = {"first": slice(0, edge), "last": slice(n - edge, n)}
        tensors = {}
        if is_whole:
            x = torch.zeros(1, n, dtype=torch.bfloat16, device=report.device)
            for at, place in places.items():
                x[0, place] = ends[at][0].to(report.device)
            tensors = {"both": torch.nn.Parameter(x)}
        else:
            tensors = {at: torch.nn.Parameter(ends[at][:1].to(report.device, torch.bfloat16).clone()) for at in places}
        optimizer = MarsAdamW(list(tensors.values()), lr=1e-2, lr_1d=1e-2)
        for t in (1, 2):
            for at, param in tensors.items():
                param.grad = torch.zeros_like(param)
                for end, place in places.items() if at == "both" else [(at, slice(0, edge))]:
                    param.grad[0, place] = ends[end][t].to(report.device)
            optimizer.step()
            optimizer.zero_grad()
        whole = tensors.get("both")
        results.append([(whole[0, place] if is_whole else tensors[at][0]).detach() for at, place in places.items()])
        if is_whole:
            results[-1] = [end.clone() for end in results[-1]]
        del tensors, whole, optimizer
        if report.device.type == "cuda":
            torch.cuda.empty_cache()
    equal = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    report.check(f"{n:,} elements in bfloat16", equal, "both ends bit for bit")
