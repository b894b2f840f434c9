"""One rank of test_zero.py: loops under DeepSpeed's ZeRO, and the same without it in this process alone.

Usage: zero_worker.py CASE…  (of CASES or FP16_CASES). Rank 0 prints, as JSON, for every case and method the largest
relative difference of a parameter. With TRITON_INTERPRET=1, of methods that the kernels for GPUs take.
"""

import contextlib
import copy
import json
import math
import os
import sys

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from hf_mars import MarsAdamW, MarsLion, MarsShampoo, param_groups
from hf_mars.optim.kernels import gpu

STEPS, BATCH = 6, 8
MATCHED = {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw"}
METHODS = {
    "mars_adamw": (MarsAdamW, {"lr": 0.02}),
    "mars_adamw optimize_1d": (MarsAdamW, {"lr": 0.02, "optimize_1d": True}),
    "mars_lion": (MarsLion, {"lr": 0.005}),
    "mars_shampoo": (MarsShampoo, {"lr": 0.02}),
    "mars_shampoo max_norm=None": (MarsShampoo, {"lr": 0.02, "max_norm": None}),
    "mars_m": (MarsShampoo, MATCHED),
    "mars_m bfloat16 g_{t-1}": (MarsShampoo, {**MATCHED, "last_grad_dtype": "bfloat16"}),
}
if gpu.is_interpreted():
    METHODS = {method: METHODS[method] for method in ("mars_adamw optimize_1d", "mars_lion")}


def zero(stage, accumulation=1, **settings):
    return {"zero_optimization": {"stage": stage, **settings}, "gradient_accumulation_steps": accumulation}


# In half precision, with the loss scaled; without it being changed on the way, for the runs to be the same.
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 1000, "hysteresis": 100}}
FP16_CASES = {f"{stage}, fp16": {**zero(stage, stage3_param_persistence_threshold=0), **FP16} for stage in (1, 2, 3)}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
SMALL_SUB_GROUPS = {"sub_group_size": 50, "stage3_param_persistence_threshold": 0}
CASES = {
    "no ZeRO": zero(0),
    "1": zero(1, reduce_scatter=False),
    "1, round robin": zero(1, round_robin_gradients=True),
    "1, not contiguous, accumulated": zero(1, 2, contiguous_gradients=False),
    "2": zero(2),
    "2, round robin, overlap, accumulated": zero(2, 2, round_robin_gradients=True, overlap_comm=True),
    "2, no reduce_scatter": zero(2, reduce_scatter=False),
    "2, not contiguous": zero(2, contiguous_gradients=False),
    "2, aligned": zero(2, parameter_alignment=True),
    "2, offload": {**zero(2, **OFFLOAD), "zero_force_ds_cpu_optimizer": False},
    "3": zero(3),
    "3, small sub-groups, accumulated": zero(3, 2, **SMALL_SUB_GROUPS, reduce_scatter=False),
    "3, small sub-groups, overlap": zero(3, **SMALL_SUB_GROUPS, overlap_comm=True),
    "3, offload": {**zero(3, **OFFLOAD), "zero_force_ds_cpu_optimizer": False},
    "3, offload_param": zero(3, offload_param={"device": "cpu", "pin_memory": False}),
    "3, not contiguous, hpz": zero(3, contiguous_gradients=False, zero_hpz_partition_size=2),
}


class Model(nn.Module):
    """Tall, wide and square matrices, a stack, a row of one element fewer than alignment asks for, a tied embedding, a
    frozen matrix. Partitions end inside of matrices."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 7)
        self.tall, self.norm, self.wide, self.square = (
            nn.Linear(7, 16),
            nn.LayerNorm(16),
            nn.Linear(16, 5),
            nn.Linear(5, 5),
        )
        self.frozen = nn.Linear(5, 7).requires_grad_(False)
        self.stack = nn.Parameter(torch.randn(3, 7, 7) / 3)
        self.row = nn.Linear(7, 1)

    def forward(self, tokens):
        x = self.square(torch.tanh(self.wide(self.norm(torch.tanh(self.tall(self.embed(tokens)))))))
        x = torch.tanh(self.frozen(x))
        for matrix in self.stack:
            x = x + torch.tanh(x @ matrix)
        targets = tokens.roll(-1, 1)
        loss = nn.functional.cross_entropy((x @ self.embed.weight.T).flatten(0, 1), targets.flatten())
        return loss + self.row(x).square().mean()


def batches(*bad):
    """Their losses' scales, with which clipping sets in on the way, and tokens; before some of them a bad batch."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 11, (STEPS, BATCH, 6), generator=generator)
    for t in range(STEPS):
        if t in bad:
            yield math.inf, tokens[t]
        yield 0.1 * 3**t, tokens[t]


def make(method, model):
    cls, settings = METHODS[method]
    return cls(param_groups(model, 0.1), **{"gamma": 0.5, "max_norm": 0.3, **settings})


def train_alone(method):
    model = Model()
    optimizer = make(method, model)
    for scale, tokens in batches():
        (scale * model(tokens)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach() for param in model.parameters()]


def train_under_deepspeed(method, config, bad=()):
    model = Model()
    ranks, accumulation = dist.get_world_size(), config["gradient_accumulation_steps"]
    general = {
        "train_micro_batch_size_per_gpu": BATCH // ranks // accumulation,
        "gradient_clipping": 0.0,  # 1.0 by default
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=make(method, model), config={**general, **copy.deepcopy(config)}
    )
    for scale, tokens in batches(*bad):
        for some in tokens.chunk(ranks)[dist.get_rank()].chunk(accumulation):
            engine.backward(scale * engine(some))
            engine.step()
    assert engine.skipped_steps == len(bad)
    params = list(model.parameters())
    is_stage_3 = config["zero_optimization"]["stage"] == 3
    with deepspeed.zero.GatheredParameters(params) if is_stage_3 else contextlib.nullcontext():
        return [param.detach().clone() for param in params]


def largest_error(expected, actual):
    return max(((a - e).abs().max() / e.abs().max()).item() for e, a in zip(expected, actual, strict=True))


def error_of(case, method, alone):
    if case in CASES:
        return largest_error(alone[method], train_under_deepspeed(method, CASES[case]))
    # Batches whose gradients are not finite, the first among them, leave no trace: neither in x nor in g_{t−1}.
    undisturbed, disturbed = (train_under_deepspeed(method, FP16_CASES[case], bad) for bad in ((), (0, 1, 3)))
    return largest_error(undisturbed, disturbed)


def main(cases):
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    get_accelerator().is_fp16_supported = lambda: True  # slow on CPUs, but right; DeepSpeed wants fast
    alone = {method: train_alone(method) for method in METHODS}
    errors = {case: {method: error_of(case, method, alone) for method in METHODS} for case in cases}
    if dist.get_rank() == 0:
        print(json.dumps(errors), flush=True)
    dist.barrier()
    os._exit(0)  # gloo can hang when a process group is torn down


if __name__ == "__main__":
    main(sys.argv[1:])
