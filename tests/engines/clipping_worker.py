"""One rank of test_clipping_in_engines.py: steps that take the clip along, beside gradients multiplied first.

Usage: clipping_worker.py ENGINE…  Rank 0 prints, as JSON, for every engine, method and max_norm, what each rank says:
whether it ended with equal parameters and states both ways, the factors, the largest relative error of the total norm
beside that of all data in one process, and what has taken the steps of matrices. For "MarsTrainer ENGINE" and every
run: why torch clipped, the losses and norms in the log, and the sums of the weights.
"""

import json
import os
import sys
import tempfile

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate_helpers import let_accelerate_shard_on_cpus
from distributed_worker import BATCH, make_model, wrap
from engine_helpers import of_engine
from helpers import make, tiny_gpt2
from skipping_worker import local
from trainer_helpers import NO_DROPOUT, losses, make_trainer
from transformers import TrainerCallback

STEPS = 5
CASES = [
    (method, max_norm, dtype)
    for method in ("mars_adamw", "mars_lion", "mars_shampoo")
    for max_norm in (None, 0.05)
    for dtype in ("float32", "bfloat16")
]


def data(dtype):
    torch.manual_seed(1)
    return torch.randn(STEPS, BATCH, 7).to(dtype), torch.randn(STEPS, BATCH, 1).to(dtype)


def loss_of(model, x, y, t):
    return 10.0 ** (t % 3 - 2) * ((model(x) - y) ** 2).mean()


def train(engine, method, max_norm, dtype, fused):
    dtype = getattr(torch, dtype)
    inputs, targets = data(dtype)
    model, parts = wrap(engine, make_model().to(dtype), dist.get_world_size())
    alone = make_model().to(dtype)
    params = list(model.parameters())
    optimizer = make(method, params, gamma=0.3, max_norm=max_norm)
    part = dist.get_rank() * parts // dist.get_world_size()
    rows = slice(part * BATCH // parts, (part + 1) * BATCH // parts)
    factors, errors = [], []
    for t, (x, y) in enumerate(zip(inputs, targets, strict=True)):
        loss_of(model, x[rows], y[rows], t).backward()
        norm = optimizer.clip_grad_norm_(0.1)
        factors.append(torch.clamp(0.1 / (norm + 1e-6), max=1.0))
        if t == 0:
            loss_of(alone, x, y, t).backward()
            expected = sum(p.grad.double().square().sum() for p in alone.parameters()).sqrt()
            errors.append(abs(norm.item() / expected.item() - 1))
        if not fused:
            optimizer.global_clip.forget()
            for p in params:
                local(p.grad).mul_(factors[-1])
        optimizer.step()
        optimizer.zero_grad()
    tensors = [local(p.detach()) for p in params]
    tensors += [local(value) for p in params for value in optimizer.state[p].values()]
    return tensors, [factor.item() for factor in factors], max(errors), optimizer.executions["matrix"]


def outcome(engine, *case):
    (one, factors, error, execution), (two, *_) = train(engine, *case, True), train(engine, *case, False)
    same = len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    return same, factors, error, execution


class Looks(TrainerCallback):
    """May look at clipped gradients."""

    def on_pre_optimizer_step(self, *args, **kwargs):
        pass


class AddsOne(TrainerCallback):
    """Adds it when training is under way."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.trainer.add_callback(Looks())


RUNS = {
    "fused": {},
    "first": {"fuse_clip": False},
    "a callback on rank 1": {"looks_on": 1},
    "a callback during training": {"adds": True},
}


def trainer_says(engine, *, looks_on=None, adds=False, **settings):
    AcceleratorState._reset_state()
    added = AddsOne()
    callbacks = [Looks()] * (dist.get_rank() == looks_on) + [added] * adds
    settings = {"max_grad_norm": 0.5, "max_steps": 4, **of_engine(engine, 2), **settings, "save_strategy": "no"}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, model=tiny_gpt2(**NO_DROPOUT), callbacks=callbacks, **settings)
        added.trainer = trainer
        try:
            trainer.train()
        except RuntimeError as error:
            return str(error)
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    weights = [local(param.detach()).double().sum().item() for param in trainer.model.parameters()]
    return trainer.clipping.reasons, losses(trainer), norms, weights


def of_every_rank(answer):
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, answer)
    return everyone


if __name__ == "__main__":
    dist.init_process_group("gloo")
    results = {}
    for name in sys.argv[1:]:
        if name.startswith("MarsTrainer "):
            engine = name.split()[1]
            if engine == "fsdp2":
                let_accelerate_shard_on_cpus()
            results |= {f"{name} {run}": of_every_rank(trainer_says(engine, **RUNS[run])) for run in RUNS}
        else:
            results |= {f"{name} {case}": of_every_rank(outcome(name, *case)) for case in CASES}
    if dist.get_rank() == 0:
        print(json.dumps(results))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
