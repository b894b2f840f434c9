"""Time, state and temporary memory of one optimizer step, beside torch's fused AdamW and Muon.

    python benchmarks/step_time.py [--compile] [--json FILE]

Parameters: all of GPT-2 small (124M), its hidden matrices, and a set of LoRA matrices (hundreds of small tensors), in
float32. One process; the optimizers take turns, so that the machine's other load falls on all alike; medians of the
times, and of the ratios, turn by turn, to the first of each table. Gradients are random, and new tensors in every
step, as zero_grad(set_to_none=True) and a backward pass leave them. Those of each tensor have the norm 0.01, of which
‖g_t‖ alone says that max_norm=1 clips nothing; in rows named "clips" it is 10, so that every ‖c_t‖ is measured and
every c_t divided. On CUDA, if there is one, otherwise on the CPU.

"Extra peak" is what step() allocates beyond parameters, gradients and state. pytorch_optimizer's MARS is measured
where that package is installed (the `bench` extra).
"""

import argparse
import functools
import importlib.util
import json
import platform
import statistics
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_mars import MarsAdamW, MarsLion, MarsShampoo

QUIET, CLIPPED = 0.01, 10.0  # ‖g_t‖ of each tensor

LORA_RANK, LORA_WIDTH, LORA_LAYERS = 16, 1024, 24


def parameter_sets():
    """name -> shapes."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    return {
        "GPT-2 small": [p.shape for p in model.parameters()],
        "LoRA": [(LORA_RANK, LORA_WIDTH), (LORA_WIDTH, LORA_RANK)] * 4 * LORA_LAYERS,
        "hidden matrices of GPT-2 small": [p.shape for p in model.transformer.h.parameters() if p.ndim == 2],
    }


def contestants():
    """set of parameters -> {name: what makes the optimizer}; the others are compared to the first."""
    elementwise = {
        "AdamW(fused=True)": lambda params: torch.optim.AdamW(params, fused=True),
        "MarsAdamW": MarsAdamW,
        "MarsAdamW(max_norm=1)": lambda params: MarsAdamW(params, max_norm=1.0),
        "MarsAdamW(max_norm=1), clips": lambda params: MarsAdamW(params, max_norm=1.0),
        "MarsLion": MarsLion,
        "MarsLion(max_norm=1)": lambda params: MarsLion(params, max_norm=1.0),
        "MarsLion(max_norm=1), clips": lambda params: MarsLion(params, max_norm=1.0),
    }
    if importlib.util.find_spec("pytorch_optimizer"):
        from pytorch_optimizer import MARS

        elementwise["pytorch_optimizer.MARS"] = MARS

    def shampoo(params, **settings):
        return MarsShampoo([{"params": params, "kind": "matrix"}], **settings)

    orthogonal = {
        "MarsShampoo": shampoo,
        "MarsShampoo(max_norm=1)": functools.partial(shampoo, max_norm=1.0),
        "MarsShampoo(max_norm=1), clips": functools.partial(shampoo, max_norm=1.0),
    }
    if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
        orthogonal = {"torch.optim.Muon": torch.optim.Muon, **orthogonal}
    return {"GPT-2 small": elementwise, "LoRA": elementwise, "hidden matrices of GPT-2 small": orthogonal}


class Memory:
    """Bytes that are allocated at most inside the context, beyond those at its beginning."""

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # sets the high-water mark back
            self.before = self._resident("VmRSS")
        return self

    def __exit__(self, *_):
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else self._resident("VmHWM")
        self.peak = peak - self.before

    @staticmethod
    def _resident(key):
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def state_bytes(optimizer):
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(t.nbytes for t in tensors if t.numel() > 1)


def measure(makers, shapes, steps, device, compiled):
    """name -> {"seconds": of every step after two for warming up, "state_bytes", "extra_peak_bytes"}."""
    torch.manual_seed(0)
    directions = [torch.randn(shape, device=device) for shape in shapes]
    gradients = {length: [length * g / g.norm() for g in directions] for length in (QUIET, CLIPPED)}
    params = {name: [torch.nn.Parameter(0.02 * torch.randn_like(g)) for g in directions] for name in makers}
    optimizers = {name: make(params[name]) for name, make in makers.items()}
    steppers = {
        name: torch.compile(optimizer.step) if compiled else optimizer.step for name, optimizer in optimizers.items()
    }
    results = {name: {"seconds": []} for name in makers}
    for t in range(steps + 2):
        for name, result in results.items():
            length = CLIPPED if name.endswith("clips") else QUIET
            for param, gradient in zip(params[name], gradients[length], strict=True):
                param.grad = gradient.clone()
            synchronize(device)
            if t == 1:
                with Memory(device) as memory:
                    steppers[name]()
                result["extra_peak_bytes"] = max(0, memory.peak)
            else:
                start = time.perf_counter()
                steppers[name]()
                synchronize(device)
                if t > 1:
                    result["seconds"].append(time.perf_counter() - start)
            for param in params[name]:
                param.grad = None
    for name, result in results.items():
        result["state_bytes"] = state_bytes(optimizers[name])
    return results


def print_table(title, results, elements):
    first = next(iter(results.values()))["seconds"]
    print(f"\n| {title} | ms | ratio | state, bytes per parameter | extra peak, bytes per parameter |")
    print("| --- | --- | --- | --- | --- |")
    for name, result in results.items():
        median = statistics.median(result["seconds"])
        ratio = statistics.median(own / other for own, other in zip(result["seconds"], first, strict=True))
        state, extra = result["state_bytes"] / elements, result["extra_peak_bytes"] / elements
        print(f"| {name} | {1e3 * median:.1f} | {ratio:.2f} | {state:.1f} | {extra:.1f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile every step()")
    parser.add_argument("--json", help="write what was measured to this file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}{', compiled' if arguments.compile else ''}")
    report = {"torch": torch.__version__, "device": where, "machine": platform.machine(), "tables": {}}
    for (title, shapes), makers in zip(parameter_sets().items(), contestants().values(), strict=True):
        results = measure(makers, shapes, arguments.steps, device, arguments.compile)
        print_table(title, results, sum(torch.Size(shape).numel() for shape in shapes))
        report["tables"][title] = results
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
