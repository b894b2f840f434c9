"""Time of an update under DeepSpeed's ZeRO-2 with the optimizer offloaded to the CPU: ours beside DeepSpeedCPUAdam.

    torchrun --nproc_per_node 1 benchmarks/offload_step.py [--layers 4] [--turns 10]

Layers of GPT-2 small, as `engine.step()` takes it: the clip by the total norm, the step on the
flat float32 tensors, the copy into the weights. One engine per optimizer in one process; they take turns, each with
the same gradients; medians, and the median of the ratios turn by turn. DeepSpeed compiles DeepSpeedCPUAdam first.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from transformers import GPT2Config, GPT2LMHeadModel

from hf_mars import MarsAdamW, MarsLion, MarsShampoo, param_groups

CONTESTANTS = {
    "DeepSpeedCPUAdam": lambda model: DeepSpeedCPUAdam(model.parameters()),
    "MarsAdamW": lambda model: MarsAdamW(param_groups(model)),
    "MarsAdamW(max_norm=1)": lambda model: MarsAdamW(param_groups(model), max_norm=1.0),
    "MarsLion": lambda model: MarsLion(param_groups(model)),
    "MarsShampoo": lambda model: MarsShampoo(param_groups(model)),
}
VOCABULARY = 2048
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 1.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}},
}


def engine_of(make, layers, width):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, vocab_size=VOCABULARY, n_positions=64))
    engine, *_ = deepspeed.initialize(model=model, optimizer=make(model), config=CONFIG)
    return engine


def timed_step(engine, tokens):
    engine.backward(engine(tokens, labels=tokens).loss)
    start = time.perf_counter()
    engine.step()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--turns", type=int, default=10)
    arguments = parser.parse_args()
    engines = {name: engine_of(make, arguments.layers, arguments.width) for name, make in CONTESTANTS.items()}
    seconds = {name: [] for name in engines}
    for turn in range(arguments.turns + 2):
        tokens = torch.randint(VOCABULARY, (1, 64), generator=torch.Generator().manual_seed(turn))
        for name, engine in engines.items():
            taken = timed_step(engine, tokens)
            if turn >= 2:  # the first makes the states
                seconds[name].append(taken)
    first = next(iter(seconds.values()))
    print("| | ms | of DeepSpeedCPUAdam's |\n| --- | --- | --- |")
    for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, first, strict=True))
        print(f"| {name} | {1e3 * statistics.median(own):.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
