"""The host's share of one optimizer step on a GPU, measured without one: launches are stubbed.

    python benchmarks/host_time.py [--turns 200]

MARS-AdamW and MARS-Lion as `hf_mars/optim/kernels/gpu.py` takes them, and torch's fused AdamW, over 50, 150 and 500
small matrices on the CPU. The Triton kernels, and torch's functions that launch AdamW's, are replaced by functions
that do nothing: what is left is Python's work before and between launches. One process; the optimizers take turns;
medians of the thread's own time, in microseconds, and the median of the ratios turn by turn. Gradients lie where they
lay in the last step, as a caching allocator mostly gives them, or elsewhere ("moved").
"""

import argparse
import contextlib
import statistics
import time
from unittest import mock

import torch

from hf_mars import MarsAdamW, MarsLion
from hf_mars.optim.kernels import gpu

COUNTS = (50, 150, 500)
CONTESTANTS = {
    "AdamW(fused=True)": lambda params: torch.optim.AdamW(params, fused=True),
    "MarsAdamW": lambda params: MarsAdamW(params, fused=True),
    "MarsAdamW(max_norm=1)": lambda params: MarsAdamW(params, fused=True, max_norm=1.0),
    "MarsLion": lambda params: MarsLion(params, fused=True),
}


class Stub:
    """A kernel, or a module of kernels, that can be launched and does nothing."""

    def __getattr__(self, name):
        return self

    def __getitem__(self, grid):
        return lambda *args, **options: None


@contextlib.contextmanager
def stubbed_launches():
    """Inside, steps on the CPU are those of a GPU, without the work."""
    stub = Stub()
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (gpu, "is_for", lambda device: True),
            (gpu, "kernels_for", lambda device: stub),
            (torch, "_fused_adamw_", lambda *args, **options: None),
            (torch, "_foreach_add_", lambda *args, **options: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def measure(count, turns, moved):
    """name -> seconds of every step after ten for warming up."""
    params = {name: [torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(count)] for name in CONTESTANTS}
    optimizers = {name: make(params[name]) for name, make in CONTESTANTS.items()}
    memory = [torch.zeros(count, 8, 8) for _ in range(2)]
    seconds = {name: [] for name in CONTESTANTS}
    with stubbed_launches():
        for turn in range(turns + 10):
            for name, optimizer in optimizers.items():
                gradients = memory[turn % 2 if moved else 0].unbind()
                for param, gradient in zip(params[name], gradients, strict=True):
                    param.grad = gradient
                start = time.thread_time()
                optimizer.step()
                if turn >= 10:
                    seconds[name].append(time.thread_time() - start)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=200, help="steps of each that are measured, at least 1")
    arguments = parser.parse_args()
    if arguments.turns < 1:
        parser.error(f"--turns {arguments.turns}: must be at least 1")
    torch.set_num_threads(1)
    for moved in (False, True):
        print(f"\n| gradients {'moved' if moved else 'in place'} | tensors | µs | ratio |\n| --- | --- | --- | --- |")
        for count in COUNTS:
            seconds = measure(count, arguments.turns, moved)
            first = next(iter(seconds.values()))
            for name, own in seconds.items():
                ratio = statistics.median(a / b for a, b in zip(own, first, strict=True))
                print(f"| {name} | {count} | {1e6 * statistics.median(own):.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
