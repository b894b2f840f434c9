"""Parts of gpu_check.py: times on the device and on the host, beside torch's optimizers."""

from __future__ import annotations

import contextlib
import importlib
import statistics
import time

import torch
from gpu_check_steps import shampoo

from hf_mars import MarsAdamW, MarsLion
from hf_mars.optim.algorithm.newton_schulz import COEFFICIENTS, newton_schulz
from hf_mars.optim.kernels import launch, plan

# ‖g_t‖ of each tensor: which alone says that max_norm=1 clips nothing; where all are clipped.
QUIET, CLIPPED = 0.01, 10.0


def gpt2_small():
    layer = [(2304, 768), (2304,), (768, 768), (768,), (3072, 768), (3072,), (768, 3072), (768,)] + [(768,)] * 4
    return [(50257, 768), (1024, 768)] + layer * 12 + [(768,)] * 2


def one_billion():
    layer = [(2048, 2048)] * 4 + [(5632, 2048)] * 2 + [(2048, 5632)] + [(2048,)] * 2
    return [(32000, 2048)] * 2 + layer * 18 + [(2048,)]


# name -> (optimizer, ‖g‖, words moved per parameter in float32, most of AdamW's time that it may take)
CONTESTANTS = {
    "AdamW(fused=True)": (lambda params, **_: torch.optim.AdamW(params, fused=True), QUIET, 7, None),
    "MarsAdamW": (MarsAdamW, QUIET, 9, 1.35),
    "MarsAdamW(max_norm=1), nothing clips": (lambda params, **s: MarsAdamW(params, max_norm=1.0, **s), QUIET, 10, 1.5),
    "MarsAdamW(max_norm=1), all clip": (lambda params, **s: MarsAdamW(params, max_norm=1.0, **s), CLIPPED, 11, None),
    "MarsLion": (MarsLion, QUIET, 5, 0.8),
    "MarsLion(max_norm=1), nothing clips": (lambda params, **s: MarsLion(params, max_norm=1.0, **s), QUIET, 8, 1.2),
}
DTYPES = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {"kahan_sum": False}),
    "mixed": (torch.float32, {"state_dtype": "bfloat16", "last_grad_dtype": "bfloat16"}),
}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function, device, repeats):
    """Median of the seconds that the device takes."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def made(make, shapes, length, dtype, settings, device):
    """An optimizer whose parameters have gradients, after the steps in which states are made."""
    params = [torch.nn.Parameter(0.02 * torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
        param.grad.mul_(length / param.grad.float().norm())
    optimizer = make(params, **settings)
    for _ in range(3):
        optimizer.step()
    return optimizer


def copy_bandwidth(device, is_tiny):
    """Bytes per second, read and written, of a large copy on the device."""
    source = torch.ones(1 << 12 if is_tiny else 1 << 28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device, 10)


def speed(report, seconds):
    device, repeats = report.device, 2 if report.is_tiny else 20
    until = time.monotonic() + seconds
    bandwidth = copy_bandwidth(device, report.is_tiny)
    report.info("copy", f"{bandwidth / 1e9:.0f} GB/s")
    sets = {"GPT-2 small": gpt2_small(), "1B": one_billion()}
    if report.is_tiny:
        sets = {"tiny": [(20, 30), (7,)]}
    for set_name, shapes in sets.items():
        elements = sum(torch.Size(shape).numel() for shape in shapes)
        for dtype_name, (dtype, settings) in DTYPES.items():
            first = None
            for name, (make, length, words, limit) in CONTESTANTS.items():
                if time.monotonic() > until:
                    report.info(set_name, "no time left for the rest")
                    return sweep(report)
                optimizer = made(make, shapes, length, dtype, settings, device)
                elapsed = seconds_of(optimizer.step, device, repeats)
                first = first or elapsed
                row = f"{set_name}, {dtype_name}, {name}"
                report.info(row, f"{1e3 * elapsed:.3f} ms, {elapsed / first:.2f} of AdamW's")
                if dtype_name == "float32":
                    share = 4 * words * elements / elapsed / bandwidth
                    report.at_least(f"{row}: {words} words, of the copy's bandwidth", share, 0.85)
                    if limit is not None:
                        report.at_most(f"{row}: of AdamW's time", elapsed / first, limit)
                for kernel, micros in kernel_times(optimizer.step, device).items():
                    report.info(f"{row}: kernel {kernel}", f"{micros:.1f} µs")
                del optimizer
    sweep(report)


def kernel_times(function, device):
    """name -> µs on the device, in one call, of the kernels that take the most time. Empty on a CPU."""
    if device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        function()
        synchronize(device)
    times = {event.key[:60]: event.device_time_total for event in profiled.key_averages()}
    return dict(sorted(times.items(), key=lambda item: -item[1])[:5])


def sweep(report):
    """Elements of a block and warps of a program."""
    shapes = [(20, 30)] if report.is_tiny else gpt2_small()
    before = plan.BLOCK, dict(launch.OPTIONS)
    try:
        for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16)):
            plan.BLOCK = launch.BLOCK = block
            launch.OPTIONS["num_warps"] = warps
            optimizer = made(MarsAdamW, shapes, QUIET, torch.float32, {}, report.device)
            elapsed = seconds_of(optimizer.step, report.device, 2 if report.is_tiny else 20)
            report.info(f"BLOCK {block}, {warps} warps", f"{1e3 * elapsed:.3f} ms")
    finally:
        plan.BLOCK = launch.BLOCK = before[0]
        launch.OPTIONS.update(before[1])


def host(report, seconds):
    """Of small tensors: µs of the host per step, launches per step, the share of the time that the device idles."""
    for count in (3, 5) if report.is_tiny else (50, 150, 300, 500):
        first = None
        for name, (make, length, _, _) in CONTESTANTS.items():
            optimizer = made(make, [(64, 64)] * count, length, torch.float32, {}, report.device)
            times = []
            for _ in range(3 if report.is_tiny else 50):
                synchronize(report.device)
                start = time.perf_counter()
                optimizer.step()
                times.append(time.perf_counter() - start)
            own = statistics.median(times)
            first = first or own
            launches, busy = launches_and_busy(optimizer.step, report.device)
            gaps = f"{launches} launches, idle {1 - busy / own:.0%}" if launches else "launches not counted on a CPU"
            report.info(f"{count} tensors, {name}", f"{1e6 * own:.0f} µs, {own / first:.2f} of AdamW's, {gaps}")
            if name == "MarsAdamW":
                report.at_most(f"{count} tensors, {name}: of AdamW's host time", own / first, 1.3)


def launches_and_busy(function, device):
    """Kernels and copies in one call, and the seconds that they take on the device."""
    if device.type != "cuda":
        return 0, 0.0
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        function()
        synchronize(device)
    events = [event for event in profiled.key_averages() if event.device_time_total]
    return sum(event.count for event in events), sum(event.device_time_total for event in events) / 1e6


def matrices(report, seconds):
    cases = {16: (3, None)} if report.is_tiny else {768: (72, 0.7), 4096: (8, 1.0)}
    makers = {"MarsShampoo": shampoo, "MarsShampoo(max_norm=1)": lambda params: shampoo(params, max_norm=1.0)}
    if hasattr(torch.optim, "Muon"):
        makers = {"torch.optim.Muon": torch.optim.Muon, **makers}
    for module, attribute in (("dion", "Muon"), ("emerging_optimizers.orthogonalized_optimizers", "Muon")):
        with contextlib.suppress(ImportError, AttributeError):
            makers[f"{module}.{attribute}"] = getattr(importlib.import_module(module), attribute)
    for size, (count, limit) in cases.items():
        muon = None
        for name, make in makers.items():
            try:
                optimizer = made(make, [(size, size)] * count, QUIET, torch.float32, {}, report.device)
                if report.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(report.device)
                    before = torch.cuda.memory_allocated(report.device)
                elapsed = seconds_of(optimizer.step, report.device, 2 if report.is_tiny else 10)
            except Exception as error:
                if "MarsShampoo" in name:
                    raise
                report.info(f"{count} × {size}², {name}", f"not measured: {type(error).__name__}: {error}")
                continue
            peak = (torch.cuda.max_memory_allocated(report.device) - before) if report.device.type == "cuda" else 0
            muon = elapsed if name == "torch.optim.Muon" else muon
            ratio = f", {elapsed / muon:.2f} of Muon's" if muon else ""
            report.info(
                f"{count} × {size}², {name}", f"{1e3 * elapsed:.2f} ms{ratio}, extra peak {peak / 2**20:.0f} MiB"
            )
            if name == "MarsShampoo" and muon and limit:
                report.at_most(f"{size}: of Muon's time", elapsed / muon, limit)
            del optimizer
        matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(size)).to(report.device)
        values = torch.linalg.svdvals(newton_schulz(matrix).float())
        distance = (values.cpu().double() - iterated(torch.linalg.svdvals(matrix.double()))).abs().max().item()
        report.check(
            f"{size}: singular values",
            distance < 0.05,  # what bfloat16's rounding leaves: 0.02 at 16, 0.004 at 768
            f"{values.min():.3f} to {values.max():.3f}, {distance:.1e} from those of exact arithmetic",
        )


def iterated(values):
    """Where five Newton–Schulz steps without rounding take singular values of float64, in descending order."""
    a, b, c = COEFFICIENTS
    values = values / values.norm()
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    return values.sort(descending=True).values
