"""Parts of gpu_check.py: FSDP2, mixed precision's scaler, and the Trainer."""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
import time

import torch
from gpu_check_speed import launches_and_busy
from torch import nn

from hf_mars import MarsAdamW


def engines(report, seconds):
    fsdp2(report)
    scaler(report)


def mlp(width, device):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)).to(device)


def fsdp2(report):
    """One process: what DTensors cost, and that they change no result."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = report.device
    width = 16 if report.is_tiny else 2048
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.NamedTemporaryFile() as store:
        dist.init_process_group(backend, init_method=f"file://{store.name}-store", rank=0, world_size=1)
        try:
            finals, launches, peaks = [], [], []
            for is_sharded in (False, True):
                model = mlp(width, device)
                if is_sharded:
                    fully_shard(model, mesh=init_device_mesh(device.type, (1,)))
                optimizer = MarsAdamW(model.parameters(), max_norm=1.0)
                for t in range(3):
                    generator = torch.Generator(device=device).manual_seed(t)
                    model(torch.randn(8, width, generator=generator, device=device)).square().sum().backward()
                    if device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats(device)
                        before = torch.cuda.memory_allocated(device)
                    if t < 2:
                        optimizer.step()
                    else:
                        launches.append(launches_and_busy(optimizer.step, device)[0])
                        if device.type != "cuda":
                            optimizer.step()
                    if device.type == "cuda":
                        peaks.append(torch.cuda.max_memory_allocated(device) - before)
                    optimizer.zero_grad()
                finals.append([p.full_tensor() if is_sharded else p.detach() for p in model.parameters()])
            error = max(((a - b).norm() / a.norm()).item() for a, b in zip(*finals, strict=True))
            report.check("FSDP2, one rank", error < 1e-5, f"relative error {error:.1e}")
            if device.type == "cuda":
                mib = [f"{peak / 2**20:.0f}" for peak in peaks]
                report.info("launches of a step", f"{launches[0]} without FSDP2, {launches[1]} with it")
                report.info(
                    "extra peak of steps 1, 2, 3",
                    f"{', '.join(mib[:3])} MiB without FSDP2, {', '.join(mib[3:])} MiB with it",
                )
        finally:
            dist.destroy_process_group()


def scaler(report):
    """float16: a step with an infinite gradient is skipped, and nothing of it is remembered."""
    device = report.device
    model = mlp(16 if report.is_tiny else 512, device)
    optimizer = MarsAdamW(model.parameters(), lr=1e-3, max_norm=1.0)
    grad_scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    moved = []
    for t in range(4):
        with torch.autocast(device.type, dtype=dtype):
            loss = model(torch.randn(8, model[0].in_features, device=device)).float().square().mean()
        grad_scaler.scale(loss).backward()
        if t == 2:
            next(model.parameters()).grad[0, 0] = math.inf
        before = [p.detach().clone() for p in model.parameters()]
        grad_scaler.step(optimizer)
        grad_scaler.update()
        optimizer.zero_grad()
        moved.append(any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)))
    states = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    finite = all(bool(v.isfinite().all()) for v in [*states, *model.parameters()])
    taken = ", ".join("a step" if moves else "no step" for moves in moved)
    right = moved == [True, True, False, True] and finite
    report.check("GradScaler, the third gradient is infinite", right, taken)


def trainer(report, seconds):
    """Whole training steps in the stock Trainer, turn by turn."""
    import trainer_throughput as throughput
    from transformers import GPT2Config

    names, model = throughput.NAMES, "gpt2-small"
    if report.is_tiny:
        model = "tiny"
        config = GPT2Config(vocab_size=32, n_layer=1, n_head=1, n_embd=8, n_positions=16, **throughput.DROPOUT)
        throughput.MODELS[model] = (config, 2, {"use_cpu": True})
    config, batch_size, settings = throughput.MODELS[model]
    tokens = batch_size * config.n_positions
    rates = {name: [] for name in names}
    until, turn = time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory() as folder:
        while turn < 2 or (time.monotonic() < until and not report.is_tiny):
            for name in names:
                made, times = throughput.make(name, config, batch_size, settings, 4 if report.is_tiny else 12, folder)
                with contextlib.redirect_stdout(None):
                    made.train()
                if turn:  # the first one compiles kernels
                    rates[name].append(tokens / statistics.median(times.seconds[2:]))
                del made
            turn += 1
    first = rates["adamw_torch_fused"]
    for name, own in rates.items():
        ratio = statistics.median(a / b for a, b in zip(own, first, strict=True))
        report.info(f"{model}, {name}", f"{statistics.median(own):.0f} tokens per second, {len(own)} turns")
        if name != "adamw_torch_fused":
            report.at_least(f"{model}, {name}: of adamw_torch_fused", ratio, 0.98)
