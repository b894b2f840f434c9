"""The model: its configuration, with the tokenizer's vocabulary, and its weights."""

from __future__ import annotations

import contextlib
import copy
import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GPT2Config
from transformers.integrations import deepspeed

from .adapters import load_adapters, new_adapters
from .arguments import DEFAULT_BLOCK_SIZE, ModelArguments
from .errors import UsageError
from .log import logger

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# The model that is trained when the command line names none: minutes on two CPU cores.
SMALL_GPT2: dict[str, Any] = {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 128}


def load_config(model_args: ModelArguments, block_size: int | None) -> PreTrainedConfig:
    """The model's configuration, still without the vocabulary of a tokenizer that is to be trained."""
    argument = "config_name" if model_args.config_name else "model_name_or_path"
    if name := getattr(model_args, argument):
        source, revision = f"--{argument} {name}", None if model_args.config_name else model_args.model_revision
        if argument == "model_name_or_path" and model_args.base_model:
            name, revision = model_args.base_model
            source += f", adapters of {name}"
        try:
            config = AutoConfig.from_pretrained(name, revision=revision, **model_args.hub_options)
        except Exception as error:  # a damaged file fails where it is used first
            raise UsageError(f"{source}: no model configuration there: {error}") from error
    elif model_args.model_type is not None:
        config = CONFIG_MAPPING[model_args.model_type]()
    else:
        config = GPT2Config(**{**SMALL_GPT2, "n_positions": block_size or SMALL_GPT2["n_positions"]})
    if model_args.config_overrides:
        override_config(config, model_args.config_overrides)
    if not (name or model_args.model_type):
        sizes = ", ".join(f"{key}={getattr(config, key)}" for key in SMALL_GPT2)
        logger.info(f"no model is named: training a small GPT-2 from scratch ({sizes})")
    return config


def override_config(config: PreTrainedConfig, overrides: str) -> None:
    """Apply "key=value,key=value" to a configuration, in place."""
    for entry in overrides.split(","):
        key, equals, _ = entry.partition("=")
        if not equals or not hasattr(config, key):
            nearest = difflib.get_close_matches(key, config.to_dict(), n=1, cutoff=0.0)[0]
            raise UsageError(
                f"--config_overrides {overrides}: {entry!r} must be key=value with a key of the {config.model_type} "
                f"configuration; the nearest is {nearest!r}"
            )
    try:
        config.update_from_string(overrides)
    except Exception as error:  # configurations check values in ways of their own
        raise UsageError(f"--config_overrides {overrides}: {error}") from error


@contextlib.contextmanager
def _without_zero_3() -> Iterator[None]:
    """Inside, transformers makes whole models, also under ZeRO-3: to be sharded, they must have memory."""
    kept = deepspeed._hf_deepspeed_config_weak_ref
    config = None if kept is None else kept()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def count_parameters(config: PreTrainedConfig, model_args: ModelArguments, vocab_size: int | None) -> int:
    """The number of a model's parameters, from a model without memory.

    Args:
        config: of the model.
        vocab_size: of the tokenizer that is to be trained for it; None: that of the configuration.

    Raises:
        UsageError: no model can be made of the configuration.
    """
    config = copy.deepcopy(config)
    text_config = config.get_text_config()
    if vocab_size is not None:
        text_config.vocab_size = vocab_size
    layers = getattr(text_config, "num_hidden_layers", None)
    source = (
        f"--config_overrides {model_args.config_overrides}"
        if model_args.config_overrides
        else f"--config_name {model_args.config_name}"
        if model_args.config_name
        else f"--model_name_or_path {model_args.model_name_or_path}"
    )
    try:
        if layers is not None and layers < 1:
            raise ValueError(f"{layers} layers")
        with _without_zero_3(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=model_args.trust_remote_code)
    except Exception as error:  # each of a hundred models has its own
        raise UsageError(f"{source}: is no {config.model_type} model: {type(error).__name__}: {error}") from error
    return int(model.num_parameters())


def choose_block_size(block_size: int | None, config: PreTrainedConfig) -> int:
    """The block size asked for, else the number of the model's positions, at most DEFAULT_BLOCK_SIZE."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if block_size is None:
        return min(DEFAULT_BLOCK_SIZE, positions or DEFAULT_BLOCK_SIZE)
    if positions is not None and block_size > positions:
        raise UsageError(f"--block_size {block_size}: the model has {positions} positions; allowed: 2 to {positions}")
    return block_size


def fit_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, model_args: ModelArguments) -> None:
    """Give a new model the tokenizer's vocabulary; make sure that any model's embedding holds it."""
    text_config = config.get_text_config()
    if not model_args.is_pretrained:
        overridden = {entry.partition("=")[0] for entry in (model_args.config_overrides or "").split(",")}
        if "vocab_size" not in overridden and (model_args.trains_tokenizer or model_args.config_name is None):
            text_config.vocab_size = len(tokenizer)
        text_config.bos_token_id, text_config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        if (text_config.pad_token_id or 0) >= text_config.vocab_size:
            text_config.pad_token_id = tokenizer.pad_token_id
    if len(tokenizer) > text_config.vocab_size:
        source = f"--tokenizer_name {model_args.tokenizer_name}" if model_args.tokenizer_name else "the tokenizer"
        raise UsageError(
            f"{source}: has {len(tokenizer)} tokens, but the model's embedding has {text_config.vocab_size} rows; "
            f"allowed: a tokenizer of at most {text_config.vocab_size} tokens"
            + ("" if model_args.is_pretrained else f", or --config_overrides vocab_size={len(tokenizer)}")
        )


def _pretrained(name: str, **options: Any) -> PreTrainedModel:
    """A model with its weights.

    Raises:
        UsageError: they cannot be read, or are not finite.
    """
    source = f"--model_name_or_path {name}"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    except (ImportError, ValueError):
        raise
    except Exception as error:  # safetensors, pickle, torch and zip files have errors of their own
        raise UsageError(f"{source}: its weights cannot be loaded: {type(error).__name__}: {error}") from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        logger.warning(
            f"{source}: {len(missing)} of its tensors are missing and begin at random: {', '.join(missing[:5])}"
            + (", …" if missing[5:] else "")
        )
    for parameter, value in model.named_parameters():
        if not value.isfinite().all():
            raise UsageError(f"{source}: its weights are not finite (NaN or infinite) in {parameter}")
    return cast("PreTrainedModel", model)


def load_model(config: PreTrainedConfig, model_args: ModelArguments) -> PreTrainedModel | PeftModel:
    """The pretrained model, or a new one with random weights, with adapters if they are asked for.

    Raises:
        UsageError: an attention that the model does not have, or adapters that do not fit it.
    """
    options: dict[str, Any] = {} if model_args.dtype is None else {"dtype": model_args.dtype}
    if model_args.attn_implementation is not None:
        options["attn_implementation"] = model_args.attn_implementation
    try:
        if model_args.model_name_or_path is not None:
            name, revision = model_args.base_model or (model_args.model_name_or_path, model_args.model_revision)
            model = _pretrained(name, config=config, revision=revision, **options, **model_args.hub_options)
        else:
            if model_args.dtype == "auto":
                del options["dtype"]
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=model_args.trust_remote_code, **options)
    except UsageError:
        raise
    except (ImportError, ValueError) as error:
        if model_args.attn_implementation is None:
            raise UsageError(f"--model_name_or_path {model_args.model_name_or_path}: {error}") from error
        raise UsageError(f"--attn_implementation {model_args.attn_implementation}: {error}") from error
    if model.loss_type is None:
        # transformers derives this from the class's name, and GPT2LMHeadModel says nothing. Trainer would then divide
        # by all labels although the first of each block is no target: losses too small by 1/block_size.
        model.loss_type = "ForCausalLM"
    kind = "fine-tuning" if model_args.is_pretrained else "new model"
    # Of ZeRO-3's shards, whose own sizes are 0, the wholes.
    parameters = sum(getattr(param, "ds_numel", param.numel()) for param in model.parameters())
    logger.info(f"{kind}: {type(model).__name__} with {parameters:,} parameters in {model.dtype}")
    if model_args.base_model is not None:
        adapted = load_adapters(model, model_args)
    elif model_args.lora_r is not None:
        adapted = new_adapters(model, model_args.lora_r, model_args)
    else:
        return model
    trained, total = adapted.get_nb_trainable_parameters()
    logger.info(f"{trained:,} of {total:,} parameters are trained, those of the adapters")
    return adapted
