"""LoRA adapters: those of the model that is named, or new ones."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import find_adapter_config_file

from .arguments import ModelArguments
from .errors import UsageError
from .log import logger

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def find_base_model(model_args: ModelArguments) -> None:
    """Set base_model where model_name_or_path holds adapters, as runs with --lora_r leave them.

    Raises:
        UsageError: they cannot be used.
    """
    name = model_args.model_name_or_path
    if name is None:
        return
    try:
        path = find_adapter_config_file(name, **_options(model_args))
    except (OSError, ValueError):
        return  # load_config says what is wrong
    if path is None:
        return
    if importlib.util.find_spec("peft") is None:
        raise UsageError(f"--model_name_or_path {name}: holds adapters, which need the package peft: pip install peft")
    if model_args.lora_r is not None:
        raise UsageError(
            f"--lora_r {model_args.lora_r}: --model_name_or_path {name} holds adapters, which are trained further; "
            "drop it, or give the model that they are for"
        )
    if (Path(name) / "config.json").is_file():
        raise UsageError(
            f"--model_name_or_path {name}: holds a model (config.json) and adapters (adapter_config.json); "
            "remove the one that a later run was to replace"
        )
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        model_args.base_model = config["base_model_name_or_path"], config.get("revision")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(
            f"--model_name_or_path {name}: adapter_config.json names no base model: {type(error).__name__}: {error}"
        ) from error


def _options(model_args: ModelArguments) -> dict[str, Any]:
    return {"revision": model_args.model_revision, "cache_dir": model_args.cache_dir, "token": model_args.token}


def load_adapters(model: PreTrainedModel, model_args: ModelArguments) -> PeftModel:
    """The model with the adapters in model_name_or_path, which are trained further."""
    from peft import PeftModel

    name = str(model_args.model_name_or_path)
    try:
        return PeftModel.from_pretrained(model, name, is_trainable=True, **_options(model_args))
    except (RuntimeError, ValueError) as error:  # of another shape, or for other modules
        raise UsageError(f"--model_name_or_path {name}: the adapters do not fit their model: {error}") from error


def new_adapters(model: PreTrainedModel, rank: int, model_args: ModelArguments) -> PeftModel:
    """The model with LoRA adapters of a rank, which alone are trained and saved."""
    from peft import LoraConfig, get_peft_model

    modules = model_args.lora_target_modules
    scale: dict[str, Any] = {} if model_args.lora_alpha is None else {"lora_alpha": model_args.lora_alpha}
    config = LoraConfig(
        r=rank,
        lora_dropout=model_args.lora_dropout or 0.0,
        target_modules=modules if modules in (None, "all-linear") else modules.split(","),
        task_type="CAUSAL_LM",
        **scale,
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:  # no such modules, or no choice of peft's for this model
        raise UsageError(f"--lora_target_modules {modules}: {error}") from error
    names: Any = adapted.active_peft_config.target_modules
    logger.info(f"LoRA adapters of {', '.join(sorted(names))}")
    return adapted
