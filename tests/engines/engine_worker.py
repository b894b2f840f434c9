"""One rank of the tests of engines (engine_helpers.py): Trainer runs under one engine, all in one launch.

Usage: engine_worker.py PLAN.json, with "engine" ("ddp", "fsdp2" or "deepspeed"), "processes", "folder" (each run gets
one in it), "model" (where to load it from), "results" (a file) and "runs". A run has "name", "settings"
(TrainingArguments) and where wanted "trainer" (one of TRAINERS), "resume" (a checkpoint), "lora" (true) and "die_at"
(a step at whose start the last rank kills itself). Rank 0 saves of every run the losses, the number of steps, the
whole weights, each rank's keys of the optimizer state and the model card's words about the optimizer.
"""

import contextlib
import gc
import json
import os
import signal
import sys

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType
from accelerate_helpers import let_accelerate_shard_on_cpus
from engine_helpers import with_lora
from torch.distributed.tensor import DTensor
from trainer_helpers import CountSteps, MarsTrainer, Trainer, losses, optimizer_of, train
from transformers import GPT2LMHeadModel, TrainerCallback, modelcard
from transformers.integrations import HfDeepSpeedConfig

TRAINERS = {cls.__name__: cls for cls in (Trainer, MarsTrainer)}
DISTRIBUTED_TYPES = {
    "ddp": DistributedType.MULTI_CPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed": DistributedType.DEEPSPEED,
}


class Dies(TrainerCallback):
    """As if the machine under the last rank went down."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def whole_weights(trainer):
    gathered = contextlib.nullcontext()
    params = dict(trainer.model.named_parameters())
    if any(hasattr(p, "ds_id") for p in params.values()):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(params.values()))
    with gathered:
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in params.items()
        }


def state_keys(trainer):
    """The keys of the optimizer state on every rank, parameter by parameter."""
    optimizer = getattr(optimizer_of(trainer), "optimizer", optimizer_of(trainer))  # under DeepSpeed's wrapper
    mine = [sorted(optimizer.state.get(p, {})) for group in optimizer.param_groups for p in group["params"]]
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    return everyones


def main(plan):
    torch.set_num_threads(1)
    gc.freeze()  # every run collects garbage, which takes longer than its training otherwise
    engine, processes = plan["engine"], plan["processes"]
    if engine == "fsdp2":
        let_accelerate_shard_on_cpus()
    results = {}
    for run in plan["runs"]:
        AcceleratorState._reset_state()
        settings = run["settings"]
        # While it lives, ZeRO-3 shards what from_pretrained() makes.
        deepspeed = HfDeepSpeedConfig(settings["deepspeed"]) if "deepspeed" in settings else None
        model = GPT2LMHeadModel.from_pretrained(plan["model"])
        if deepspeed is not None and deepspeed.is_zero3():
            assert all(param.shape == (0,) for param in model.parameters())
        if run.get("lora"):
            model = with_lora(model)
        steps = CountSteps()
        trainer = train(
            os.path.join(plan["folder"], run["name"]),
            cls=TRAINERS[run.get("trainer", "MarsTrainer")],
            model=model,
            resume=run.get("resume"),
            callbacks=[steps, Dies(run.get("die_at"))],
            **settings,
        )
        assert dist.get_world_size() == trainer.args.world_size == processes
        assert trainer.accelerator.distributed_type == DISTRIBUTED_TYPES[engine], trainer.accelerator.distributed_type
        results[run["name"]] = {
            "losses": losses(trainer),
            "steps": steps.taken,
            "weights": whole_weights(trainer),
            "state_keys": state_keys(trainer),
            "card": modelcard.extract_hyperparameters_from_trainer(trainer)["optimizer"],
        }
    if trainer.is_world_process_zero():
        torch.save(results, plan["results"])
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo can hang when a process group is torn down after DDP


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(json.load(file))
