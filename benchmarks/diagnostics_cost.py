"""What the diagnostics cost: the callback at steps that are not logged, the measurement at one that is.

    python benchmarks/diagnostics_cost.py

All parameters of GPT-2 small (124M) in float32, MarsAdamW, random gradients; one process. Medians of 5 measurements
(steps not logged: of 5 times 10,000). On CUDA, if there is one, otherwise on the CPU.
"""

import statistics
import time

import torch
from step_time import Memory, parameter_sets
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_mars import MarsAdamW, MarsDiagnosticsCallback
from hf_mars.optim.diagnostics import step_diagnostics

CALLS, REPEATS = 10_000, 5


def seconds(function, device):
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in parameter_sets()["GPT-2 small"]]
    optimizer = MarsAdamW(params)

    def new_gradients():
        for param in params:
            param.grad = torch.randn_like(param).mul_(1e-6)

    new_gradients()
    optimizer.step()
    new_gradients()

    args = TrainingArguments("diagnostics_cost", logging_steps=500, use_cpu=device.type == "cpu", report_to="none")
    state, control = TrainerState(global_step=1, max_steps=1000, logging_steps=500), TrainerControl()
    callback = MarsDiagnosticsCallback()

    def steps_not_logged():
        for _ in range(CALLS):
            callback.on_step_begin(args, state, control, optimizer=optimizer)
            callback.on_pre_optimizer_step(args, state, control, optimizer=optimizer)
            callback.on_optimizer_step(args, state, control, optimizer=optimizer)

    not_logged = seconds(steps_not_logged, device) / CALLS
    with Memory(device) as memory:
        step_diagnostics(optimizer)
    logged = seconds(lambda: step_diagnostics(optimizer), device)

    def step_with_new_gradients():
        new_gradients()
        optimizer.step()

    step = seconds(step_with_new_gradients, device) - seconds(new_gradients, device)
    print(f"torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads")
    print(f"a step that is not logged: {1e6 * not_logged:.1f} µs")
    print(
        f"a logged step: {1e3 * logged:.0f} ms and {memory.peak / 2**20:.0f} MiB; step() itself: {1e3 * step:.0f} ms"
    )


if __name__ == "__main__":
    main()
