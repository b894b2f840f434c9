"""What lets accelerate shard on CPUs."""

import os

from accelerate.state import DistributedType, PartialState
from transformers import training_args


def let_accelerate_shard_on_cpus():
    """accelerate makes FSDP of what it takes for GPUs only, and transformers asks these for bfloat16. This much is
    simulated: the processes, their groups and the sharding are real."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    training_args.is_torch_bf16_gpu_available = lambda: True
