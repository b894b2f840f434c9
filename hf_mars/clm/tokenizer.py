"""The tokenizer: the one that is named, the model's, or one that is trained on the texts."""

from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .arguments import DataTrainingArguments, ModelArguments
from .bpe import END_OF_TEXT, train_bpe
from .errors import UsageError
from .log import logger
from .processes import all_or_none
from .texts import Texts


def load_tokenizer(
    model_args: ModelArguments, data_args: DataTrainingArguments, checkpoint: str | None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that is named, or that a resumed run trained; None if one is to be trained, or not needed."""
    if name := model_args.tokenizer_name:
        return read_tokenizer(f"--tokenizer_name {name}", name, None, model_args)
    name = model_args.model_name_or_path
    if name is None:
        return AutoTokenizer.from_pretrained(checkpoint) if checkpoint and not data_args.are_tokens else None
    try:
        return read_tokenizer(f"--model_name_or_path {name}", name, model_args.model_revision, model_args)
    except UsageError:
        if model_args.base_model is None:
            raise
        base, revision = model_args.base_model
        return read_tokenizer(f"--model_name_or_path {name}, adapters of {base}", base, revision, model_args)


def read_tokenizer(
    source: str, name: str, revision: str | None, model_args: ModelArguments
) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or on the Hub; messages call it `source`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, use_fast=model_args.use_fast_tokenizer, revision=revision, **model_args.hub_options
        )
    except Exception as error:  # a damaged file fails where it is used first
        raise UsageError(f"{source}: no tokenizer there: {error}") from error
    if tokenizer.vocab_size <= len(tokenizer.all_special_ids):
        # Without its files, transformers makes a tokenizer of nothing but special tokens.
        raise UsageError(f"{source}: no tokenizer there; give --tokenizer_name")
    return tokenizer


def train_tokenizer(texts: Texts, vocab_size: int, block_size: int, show_progress: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the main process and sent to the others."""
    trained: list[Any] = [None]
    with all_or_none():
        if PartialState().is_main_process:
            trained = [train_bpe(texts, vocab_size, show_progress=show_progress).to_str()]
    broadcast_object_list(trained)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained[0]),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=block_size,
    )
    logger.info(f"trained a byte-level BPE of {len(tokenizer):,} tokens on the training text")
    return tokenizer
