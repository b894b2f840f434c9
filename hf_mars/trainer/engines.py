"""Refuses engines that MARS does not work with, before training starts, and names what to use instead."""

from __future__ import annotations

import os
from typing import Any

from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import TrainingArguments
from transformers.utils import logging

from .defaults import mars_default
from .names import optim_name

logger = logging.get_logger(__name__)


def check_engine(args: TrainingArguments, settings: dict[str, Any]) -> None:
    """Refuse an optimizer that would not be MARS under the engine that `args` and the launcher ask for.

    Where DeepSpeed offloads the optimizer and the configuration does not say by which one, it is told to keep ours.

    Args:
        args: after their `__post_init__`, which reads the engines' configurations.
        settings: the optimizer's keyword arguments; the constructor's defaults where they are missing.

    Raises:
        ValueError: FSDP1; Megatron-LM; DeepSpeed in exact mode, with offload to NVMe, with its tensor parallelism or
            universal checkpoints, or with a configuration that replaces the optimizer; several GPUs in one process in
            exact mode.
    """
    name = f"optim={optim_name(args)!r}"
    exact = settings.get("exact", mars_default("exact"))
    if _fsdp_version(args) == 1:
        raise ValueError(
            f"{name} does not work with FSDP1, which gives the optimizer flat slices of the parameters; use FSDP2: "
            'fsdp_version: 2 in accelerate\'s configuration, or fsdp_config={"version": 2}'
        )
    if parse_flag_from_env("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError(
            f"{name} does not work with Megatron-LM, which makes optimizers of its own for its pipeline and tensor "
            "parallelism; use FSDP2 (fsdp_version: 2)"
        )
    if exact and args.fp16:
        raise ValueError("optim_args exact=true does not work with fp16=True; use bf16=True or full precision")
    if args.deepspeed_plugin is not None:
        _check_deepspeed(name, args.deepspeed_plugin.hf_ds_config.config, exact)
    if exact and args.n_gpu > 1:
        raise ValueError(
            f"optim_args exact=true does not work with {args.n_gpu} GPUs in one process (torch.nn.DataParallel): the "
            "two gradients of an update would see different dropout masks; start one process per GPU "
            f"(torchrun --nproc_per_node {args.n_gpu}, or accelerate launch), or use exact=false"
        )


def check_model(args: TrainingArguments, model: nn.Module) -> None:
    """Refuse a model that was loaded in a way that MARS does not work with.

    Raises:
        ValueError: transformers cut it into the stages of a pipeline.
    """
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    stages = getattr(config, "pp_size", None) or 1
    if stages > 1:
        raise ValueError(
            f"optim={optim_name(args)!r} does not work with pipeline parallelism (pp_size={stages}): each process "
            "would train its own stage alone; load the model with fsdp_size, tp_size or ep_size instead"
        )


def _fsdp_version(args: TrainingArguments) -> int | None:
    if args.fsdp_plugin_args is not None:
        return args.fsdp_plugin_args.get("fsdp_version", 1)
    # As `accelerate launch` tells accelerate's FullyShardedDataParallelPlugin.
    return int(os.environ.get("FSDP_VERSION", "1")) if parse_flag_from_env("ACCELERATE_USE_FSDP") else None


def _check_deepspeed(name: str, config: dict[str, Any], exact: bool) -> None:
    if "optimizer" in config:
        raise ValueError(
            f'the DeepSpeed configuration has an "optimizer" of its own, which would replace {name}: remove it there'
        )
    if exact:
        raise ValueError(
            "optim_args exact=true does not work with DeepSpeed, whose backward is also its optimizer's step; use "
            "FSDP2 (fsdp_version: 2), DDP or exact=false"
        )
    tensor_parallel = (config.get("tensor_parallel") or {}).get("autotp_size") or 1
    if tensor_parallel != 1:
        raise ValueError(
            f'{name} does not work with DeepSpeed\'s tensor parallelism ("autotp_size": {tensor_parallel!r}), whose '
            "parameters are slices of matrices and do not say so; remove it there, or use FSDP2 (fsdp_version: 2)"
        )
    if (config.get("checkpoint") or {}).get("load_universal"):
        raise ValueError(
            f'{name} does not resume from DeepSpeed\'s universal checkpoints ("load_universal": true), which keep '
            "Adam's two averages alone and would drop g_{t−1}; resume on as many processes as have saved, or use "
            "FSDP2 (fsdp_version: 2), whose checkpoints resume on any number"
        )
    zero = config.get("zero_optimization") or {}
    if zero.get("zenflow"):
        raise ValueError(
            f'{name} does not work with DeepSpeed\'s "zenflow", which takes steps of AdamW; remove it from the '
            "DeepSpeed configuration"
        )
    _check_offload(name, config, zero)


def _check_offload(name: str, config: dict[str, Any], zero: dict[str, Any]) -> None:
    """What DeepSpeed may move to CPUs and disks."""
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        raise ValueError(
            f'{name} is not tested with DeepSpeed\'s offload_param to NVMe, and thus refused; use "device": "cpu"'
        )
    offload = zero.get("offload_optimizer") or {}
    if offload.get("device") == "nvme":
        raise ValueError(
            f"{name} does not work with DeepSpeed's offload_optimizer to NVMe, which swaps the states of DeepSpeed's "
            'own optimizers only; use "device": "cpu"'
        )
    device = offload.get("device") or "none"
    if device == "none":
        return
    if offload.get("super_offload") or offload.get("ratio", 1.0) != 1.0:
        key, value = ("super_offload", "true") if offload.get("super_offload") else ("ratio", offload["ratio"])
        raise ValueError(
            f'{name} does not work with "{key}": {value} in DeepSpeed\'s offload_optimizer, which takes steps of '
            f"DeepSpeed's AdamW; remove it there"
        )
    _keep_optimizer(name, config, device)


def _keep_optimizer(name: str, config: dict[str, Any], device: str) -> None:
    """Offloading, DeepSpeed insists on an optimizer of its own unless it is told not to."""
    key = "zero_force_ds_cpu_optimizer"
    if config.get(key):
        raise ValueError(
            f'DeepSpeed\'s offload_optimizer (device {device!r}) with "{key}": true would not run {name}, only '
            f"DeepSpeedCPUAdam: remove that line from the DeepSpeed configuration, or set it to false"
        )
    if key not in config:
        config[key] = False
        logger.warning(f'DeepSpeed offloads to the CPU: "{key}" is set to false, so that {name} takes the steps there')
