"""Time of one optimizer step on the parameters of GPT-2 small (124M, float32), beside torch's fused AdamW and Muon.

    python benchmarks/step_time.py

One process; the optimizers take turns, so that the machine's other load falls on all alike; medians, and ratios to the
first of each table. Gradients are random and fixed; no clip is active.
"""

import argparse
import statistics
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_mars import MarsAdamW, MarsLion, MarsShampoo

TABLES = {
    "all parameters": {
        "AdamW(fused=True)": lambda params: torch.optim.AdamW(params, fused=True),
        "MarsAdamW": MarsAdamW,
        "MarsAdamW(max_norm=None)": lambda params: MarsAdamW(params, max_norm=None),
        "MarsLion": MarsLion,
        "MarsLion(max_norm=None)": lambda params: MarsLion(params, max_norm=None),
    },
    "hidden matrices": {"torch.optim.Muon": torch.optim.Muon, "MarsShampoo": MarsShampoo},
}


def measure(makers, shapes, steps):
    """Seconds of each of ``steps`` steps, after one for warming up, of every optimizer."""
    torch.manual_seed(0)
    optimizers = {}
    for name, make in makers.items():
        params = [torch.nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes]
        for param in params:
            param.grad = 1e-4 * torch.randn_like(param)
        optimizers[name] = make(params)
    seconds = {name: [] for name in optimizers}
    for t in range(steps + 1):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            if t > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    shapes = {
        "all parameters": [p.shape for p in model.parameters()],
        "hidden matrices": [p.shape for p in model.transformer.h.parameters() if p.ndim == 2],
    }
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU")
    for title, makers in TABLES.items():
        seconds = measure(makers, shapes[title], arguments.steps)
        first = statistics.median(next(iter(seconds.values())))
        print(f"\n| {title} | ms | ratio |\n| --- | --- | --- |")
        for name, values in seconds.items():
            median = statistics.median(values)
            print(f"| {name} | {1e3 * median:.0f} | {median / first:.2f} |")


if __name__ == "__main__":
    main()
