"""One rank of test_parallelism.py: Trainer runs of models that are sharded along several mesh dimensions.

Usage: parallel_worker.py FOLDER, with plan.json in it: a list of runs, each with "name", "way" (one of WAYS),
"settings" (TrainingArguments) and where wanted "resume" (a checkpoint). Rank 0 saves of every run the losses and whole
weights.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import ParallelismConfig
from accelerate_helpers import let_accelerate_shard_on_cpus
from meshes import share_meshes
from parallel_models import load
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from trainer_helpers import losses, train
from transformers.distributed import DistributedConfig

# How a model is sharded: by accelerate when training starts, or by transformers when it is loaded.
WAYS = {
    "HSDP": {"parallelism_config": {"dp_replicate_size": 2, "dp_shard_size": 2}},
    "CPU offload": {"offload_params": True},
    "tensor parallel": {"tp_size": 4},
    "HSDP, loaded": {"fsdp_size": 2, "dp_replicate_size": 2},
    "FSDP2 and tensor parallel": {"fsdp_size": 2, "tp_size": 2},
    "expert parallel": {"fsdp_size": 4, "ep_size": 2},
}
BY_ACCELERATE = ("HSDP", "CPU offload")


def settings_of(way, model_type):
    """TrainingArguments of accelerate's ways."""
    if way not in BY_ACCELERATE:
        return {}
    config = {"version": 2, "transformer_layer_cls_to_wrap": [model_type], "state_dict_type": "SHARDED_STATE_DICT"}
    settings = {"fsdp": True, "fsdp_config": config}
    if "parallelism_config" in WAYS[way]:
        settings["parallelism_config"] = ParallelismConfig(**WAYS[way]["parallelism_config"])
    else:
        config.update(WAYS[way])
    return settings


def main(folder):
    torch.set_num_threads(1)
    let_accelerate_shard_on_cpus()
    torch.Tensor.pin_memory = lambda tensor, *args, **kwargs: tensor  # needs an accelerator
    share_meshes()
    dist.init_process_group("gloo")
    results = {}
    for run in json.loads((folder / "plan.json").read_text()):
        AcceleratorState._reset_state()
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # TrainingArguments set it for the whole process
        way = run["way"]
        loading = {} if way in BY_ACCELERATE else {"distributed_config": DistributedConfig(**WAYS[way])}
        model = load(folder, way, **loading)
        trainer = train(
            folder / run["name"],
            model=model,
            resume=run.get("resume"),
            use_cpu=False,
            **settings_of(way, next(iter(model._no_split_modules))),
            **run["settings"],
        )
        for module in trainer.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after an evaluation it keeps what it has gathered
        params = dict(trainer.model.named_parameters())
        assert all(isinstance(param, DTensor) for param in params.values()) or way == "tensor parallel"
        results[run["name"]] = {
            "losses": losses(trainer),
            "weights": {
                name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in params.items()
            },
        }
    if dist.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo can hang when a process group is torn down


if __name__ == "__main__":
    main(Path(sys.argv[1]))
