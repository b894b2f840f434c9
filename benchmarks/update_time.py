"""What an update costs beside forward and backward: the clip by the total norm, the step, zero_grad.

    python benchmarks/update_time.py [--threads 1 2] [--sets "GPT-2 small" …] [--json FILE]

torch's optimizers clip with `torch.nn.utils.clip_grad_norm_`, ours with `optimizer.clip_grad_norm_`, and, in rows
named "torch's clip", with torch's. Float32, one process; the optimizers take turns, so that the machine's other load
falls on all alike; medians of the times, and of the ratios, turn by turn, to AdamW's. Gradients are new tensors in
every update, as a backward pass leaves them, in three regimes:

- "quiet": the norm of each tensor is 0.9/√n of n tensors, so that the total, 0.9, is not clipped, and ‖g_t‖ alone says
  that no ‖c_t‖ reaches max_norm=1;
- "clipped": three times as long, the total 2.7: the total norm is clipped to 1;
- "long": the total is 0.9 again, all but a tenth of it in the longest tensor, whose ‖g_t‖ does not bound ‖c_t‖ below
  max_norm=1, so that c_t itself is measured (a row of MarsAdamW(max_norm=1) alone differs).

Beside them, how many words (float32 numbers) per parameter are read or written at least.
"""

import argparse
import json
import math
import platform
import statistics
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_mars import MarsAdamW, MarsLion, MarsShampoo

REGIMES = {"quiet": 0.9, "clipped": 2.7, "long": 0.9}  # the total norm
# run_clm.py's model where no argument asks for another one.
DEMO = {"vocab_size": 512, "n_positions": 128, "n_embd": 128, "n_layer": 4, "n_head": 4}


def clip_by_torch(optimizer, params):
    return torch.nn.utils.clip_grad_norm_(params, 1.0)


def clip_by_ours(optimizer, params):
    return optimizer.clip_grad_norm_(1.0)


def parameter_sets():
    """name -> shapes."""

    def shapes_of(config):
        with torch.device("meta"):
            return [p.shape for p in GPT2LMHeadModel(config).parameters()]

    gpt2 = shapes_of(GPT2Config())
    return {
        "GPT-2 small": gpt2,
        "LoRA, 192 matrices of 16 × 1,024": [(16, 1024), (1024, 16)] * 96,
        "LoRA, 48 matrices of 8 × 768": [(8, 768), (768, 8)] * 24,
        "the demo's GPT-2": shapes_of(GPT2Config(**DEMO)),
        "hidden matrices of the demo's GPT-2": [s for s in shapes_of(GPT2Config(**DEMO))[2:] if len(s) == 2],
    }


def of_matrices(params):
    return MarsShampoo([{"params": params, "kind": "matrix"}])


# name -> (what makes the optimizer, its clip, words per parameter that the regimes "quiet" and "clipped" move)
ELEMENTWISE = {
    "AdamW(fused=True)": (lambda ps: torch.optim.AdamW(ps, fused=True), clip_by_torch, (10, 10)),
    "MarsAdamW": (MarsAdamW, clip_by_ours, (9, 10)),
    "MarsAdamW, torch's clip": (MarsAdamW, clip_by_torch, (11, 11)),
    "MarsAdamW(max_norm=1)": (lambda ps: MarsAdamW(ps, max_norm=1.0), clip_by_ours, (9, 10)),
    "MarsAdamW(max_norm=1), torch's clip": (lambda ps: MarsAdamW(ps, max_norm=1.0), clip_by_torch, (12, 12)),
    "MarsLion": (MarsLion, clip_by_ours, (6, 6)),
    "MarsLion, torch's clip": (MarsLion, clip_by_torch, (8, 8)),
}
ORTHOGONAL = {
    "AdamW(fused=True)": ELEMENTWISE["AdamW(fused=True)"],
    "MarsShampoo": (of_matrices, clip_by_ours, None),
}
if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
    ORTHOGONAL["torch.optim.Muon"] = (torch.optim.Muon, clip_by_torch, None)


def gradients_of(shapes):
    """regime -> a gradient for each parameter."""
    generator = torch.Generator().manual_seed(0)
    units = [torch.randn(shape, generator=generator) for shape in shapes]
    units = [unit / unit.double().norm().float() for unit in units]
    n, longest = len(units), max(range(len(units)), key=lambda i: units[i].numel())
    rest = math.sqrt(0.19 / max(1, n - 1))
    lengths = {regime: [1 / math.sqrt(n)] * n for regime in REGIMES}
    lengths["long"] = [0.9 if i == longest else rest for i in range(n)]
    return {
        regime: [total * length * unit for length, unit in zip(lengths[regime], units, strict=True)]
        for regime, total in REGIMES.items()
    }


def measure(contestants, shapes, updates, regime):
    """name -> seconds of every update after two for warming up."""
    gradients = gradients_of(shapes)[regime]
    generator = torch.Generator().manual_seed(1)
    params = {
        name: [torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]
        for name in contestants
    }
    optimizers = {name: make(params[name]) for name, (make, _, _) in contestants.items()}
    seconds = {name: [] for name in contestants}
    for t in range(updates + 2):
        for name, (_, clip, _) in contestants.items():
            for param, gradient in zip(params[name], gradients, strict=True):
                param.grad = gradient.clone()
            start = time.perf_counter()
            clip(optimizers[name], params[name])
            optimizers[name].step()
            optimizers[name].zero_grad()
            if t > 1:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def print_table(title, seconds, contestants, regime):
    first = next(iter(seconds.values()))
    print(f"\n| {title} | ms | ratio | words per parameter |\n| --- | --- | --- | --- |")
    for name, own in seconds.items():
        ratio = statistics.median(mine / other for mine, other in zip(own, first, strict=True))
        words = contestants[name][2]
        count = "" if words is None or regime == "long" else words[regime == "clipped"]
        print(f"| {name} | {1e3 * statistics.median(own):.2f} | {ratio:.2f} | {count} |", flush=True)


def main():
    sets = parameter_sets()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sets", nargs="+", choices=sets, default=list(sets))
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--json", help="write what was measured to this file")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, CPU, {platform.machine()}")
    report = {"torch": torch.__version__, "machine": platform.machine(), "rows": []}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for name in arguments.sets:
            contestants = ORTHOGONAL if name.startswith("hidden") else ELEMENTWISE
            for regime in arguments.regimes:
                seconds = measure(contestants, sets[name], arguments.updates, regime)
                print_table(f"{name}, {regime}, threads: {threads}", seconds, contestants, regime)
                report["rows"].append({"set": name, "regime": regime, "threads": threads, "seconds": seconds})
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
