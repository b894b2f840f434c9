"""Refuses engines that MARS does not work with, before training starts, and names what to use instead.

FSDP1 and DeepSpeed give an optimizer flat slices, cut without regard to where one parameter ends and the next begins.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from ..optim import MarsShampoo
from ..optim.mars import Mars
from .defaults import mars_default
from .names import optim_name


def check_engine(args: TrainingArguments, optimizer_cls: type[Mars], settings: dict[str, Any]) -> None:
    """Refuse an optimizer that would not be MARS under the engine that `args` and the launcher ask for.

    Args:
        args: after their `__post_init__`, which reads the engines' configurations.
        optimizer_cls: the class that `args.optim` names.
        settings: the optimizer's keyword arguments; the constructor's defaults where they are missing.

    Raises:
        ValueError: exact mode with fp16; FSDP1; DeepSpeed with MarsShampoo, with the clip, in exact mode, or
            with a configuration that replaces the optimizer; several GPUs in one process in exact mode.
    """
    name = f"optim={optim_name(args)!r}"
    exact = settings.get("exact", mars_default("exact"))
    if _fsdp_version(args) == 1:
        raise ValueError(
            f"{name} does not work with FSDP1, which gives the optimizer flat slices of the parameters; use FSDP2: "
            'fsdp_version: 2 in accelerate\'s configuration, or fsdp_config={"version": 2}'
        )
    if exact and args.fp16:
        raise ValueError("optim_args exact=true does not work with fp16=True; use bf16=True or full precision")
    if args.deepspeed_plugin is not None:
        max_norm = settings.get("max_norm", mars_default("max_norm"))
        _check_deepspeed(name, args.deepspeed_plugin.hf_ds_config.config, optimizer_cls, exact, max_norm)
    if exact and args.n_gpu > 1:
        raise ValueError(
            f"optim_args exact=true does not work with {args.n_gpu} GPUs in one process (torch.nn.DataParallel): the "
            "two gradients of an update would see different dropout masks; start one process per GPU "
            f"(torchrun --nproc_per_node {args.n_gpu}, or accelerate launch), or use exact=false"
        )


def _fsdp_version(args: TrainingArguments) -> int | None:
    if args.fsdp_plugin_args is not None:
        return args.fsdp_plugin_args.get("fsdp_version", 1)
    # As `accelerate launch` tells accelerate's FullyShardedDataParallelPlugin.
    return int(os.environ.get("FSDP_VERSION", "1")) if parse_flag_from_env("ACCELERATE_USE_FSDP") else None


def _check_deepspeed(
    name: str, config: dict[str, Any], optimizer_cls: type[Mars], exact: bool, max_norm: float | None
) -> None:
    if "optimizer" in config:
        raise ValueError(
            f'the DeepSpeed configuration has an "optimizer" of its own, which would replace {name}: remove it there'
        )
    if issubclass(optimizer_cls, MarsShampoo):
        raise ValueError(
            f"{name} does not work with DeepSpeed, which gives the optimizer flat slices of the parameters, not "
            "matrices; use FSDP2 (fsdp_version: 2), or mars_adamw or mars_lion"
        )
    if exact:
        raise ValueError(
            "optim_args exact=true does not work with DeepSpeed, whose backward is also its optimizer's step; use "
            "FSDP2 (fsdp_version: 2), DDP or exact=false"
        )
    if max_norm is not None:
        raise ValueError(
            f"{name} with max_norm={max_norm} does not work with DeepSpeed: the clip is one of single parameters, and "
            "DeepSpeed gives the optimizer flat slices of many; turn it off: --optim_args max_norm=none "
            "(max_grad_norm goes on clipping the gradient as a whole)"
        )
    offload = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    device = offload.get("device", "none")
    if device != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            f"DeepSpeed's offload_optimizer (device {device!r}) would replace {name} by DeepSpeedCPUAdam; set "
            '"zero_force_ds_cpu_optimizer": false in the DeepSpeed configuration (for accelerate launch: in the file '
            "that deepspeed_config_file names)"
        )
