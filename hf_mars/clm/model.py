"""The model: its configuration, with the tokenizer's vocabulary, and its weights."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GPT2Config

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
        except (OSError, ValueError) as error:
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
    except (TypeError, ValueError) as error:
        raise UsageError(f"--config_overrides {overrides}: {error}") from error


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
            model = AutoModelForCausalLM.from_pretrained(
                name, config=config, revision=revision, **options, **model_args.hub_options
            )
        else:
            if model_args.dtype == "auto":
                del options["dtype"]
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=model_args.trust_remote_code, **options)
    except (ImportError, ValueError) as error:
        if model_args.attn_implementation is None:
            raise
        raise UsageError(f"--attn_implementation {model_args.attn_implementation}: {error}") from error
    if model.loss_type is None:
        # transformers derives this from the class's name, and GPT2LMHeadModel says nothing. Trainer would then divide
        # by all labels although the first of each block is no target: losses too small by 1/block_size.
        model.loss_type = "ForCausalLM"
    kind = "fine-tuning" if model_args.is_pretrained else "new model"
    logger.info(f"{kind}: {type(model).__name__} with {model.num_parameters():,} parameters in {model.dtype}")
    if model_args.base_model is not None:
        adapted = load_adapters(model, model_args)
    elif model_args.lora_r is not None:
        adapted = new_adapters(model, model_args.lora_r, model_args)
    else:
        return model
    trained, total = adapted.get_nb_trainable_parameters()
    logger.info(f"{trained:,} of {total:,} parameters are trained, those of the adapters")
    return adapted
