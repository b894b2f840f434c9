"""What lets accelerate shard on CPUs."""

import os

from accelerate.state import DistributedType, PartialState


def let_accelerate_shard_on_cpus():
    """accelerate makes FSDP of what it takes for GPUs only. This much is simulated: the processes, their groups and
    the sharding are real."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
