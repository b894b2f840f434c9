"""The splits of a run, "train" and "validation": their texts or tokens, and the blocks that are made of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

from .arguments import DataTrainingArguments, ModelArguments
from .blocks import TokenBlocks, TokenStream
from .errors import UsageError
from .log import logger
from .processes import all_or_none, check_same, main_processes_first
from .texts import Texts, load_texts
from .token_bins import TokenBins, load_token_bins

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_mars import MarsTrainingArguments

Splits: TypeAlias = dict[str, Texts] | dict[str, TokenBins]


def load_splits(
    model_args: ModelArguments,
    data_args: DataTrainingArguments,
    training_args: MarsTrainingArguments,
    *,
    vocab_size: int,
    has_tokenizer: bool,
) -> Splits:
    """The splits of the sources that the arguments name, at least those that the run uses.

    Args:
        vocab_size: rows of the model's embedding; token ids in files must be smaller.
        has_tokenizer: whether there is a tokenizer already; else one is to be trained on the split "train".

    Raises:
        UsageError: in every process, if one of them cannot read the sources or if a split is missing.
    """
    splits: Splits
    with all_or_none(), main_processes_first(training_args, desc="loading the texts"):
        if data_args.are_tokens:
            splits = load_token_bins(
                train_file=data_args.train_file,
                validation_file=data_args.validation_file,
                validation_split_percentage=data_args.validation_split_percentage,
                vocab_size=vocab_size,
            )
        else:
            splits = load_texts(
                train_file=data_args.train_file,
                validation_file=data_args.validation_file,
                validation_split_percentage=data_args.validation_split_percentage,
                dataset_name=data_args.dataset_name,
                dataset_config_name=data_args.dataset_config_name,
                streaming=data_args.streaming,
                keep_linebreaks=data_args.keep_linebreaks,
                text_column=data_args.text_column,
                append_eos=data_args.append_eos,
                cache_dir=model_args.cache_dir,
                token=model_args.token,
            )
        if training_args.do_train and "train" not in splits:
            raise UsageError(
                f"--dataset_name {data_args.dataset_name}: has no train split; give another data set, or --do_eval "
                "without --do_train"
            )
        if not has_tokenizer and not data_args.are_tokens and "train" not in splits:
            raise UsageError(
                f"--dataset_name {data_args.dataset_name}: has no train split, and a tokenizer is not trained on "
                "validation text; give --model_name_or_path or --tokenizer_name"
            )
        if training_args.do_eval and "validation" not in splits:
            raise UsageError(
                f"--dataset_name {data_args.dataset_name}: has no validation split; "
                "give --validation_split_percentage between 1 and 99, or --do_train without --do_eval"
            )
    return splits


def load_blocks(
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase | None,
    block_size: int,
    data_args: DataTrainingArguments,
    training_args: MarsTrainingArguments,
) -> tuple[TokenBlocks | TokenStream | None, TokenBlocks | None]:
    """(training blocks, validation blocks); None for those that the run does not use.

    Args:
        splits: as load_splits returned them.
        tokenizer: None for token files alone.

    Raises:
        UsageError: in every process, if a split has fewer tokens than a block or differs among processes.
    """
    train_blocks: TokenBlocks | TokenStream | None = None
    eval_blocks: TokenBlocks | None = None

    def stored_blocks(split: str, max_blocks: int | None) -> TokenBlocks:
        source = splits[split]
        if isinstance(source, TokenBins):
            return TokenBlocks(source, block_size, max_blocks)
        assert tokenizer is not None
        return TokenBlocks.from_texts(
            source,
            tokenizer,
            block_size,
            max_blocks=max_blocks,
            num_proc=data_args.preprocessing_num_workers,
            # The first process of a node tokenises; the others take its tokens from the cache.
            overwrite_cache=data_args.overwrite_cache and training_args.local_process_index == 0,
            description=f"Tokenising the {split} text",
        )

    with all_or_none(), main_processes_first(training_args, desc="tokenising"):
        if training_args.do_train:
            source = splits["train"]
            if data_args.streaming and isinstance(source, Texts):
                assert tokenizer is not None
                train_blocks = TokenStream(source, tokenizer, block_size, data_args.max_train_samples)
                if next(iter(train_blocks), None) is None:
                    raise UsageError(f"--block_size {block_size}: {source.source} has fewer tokens than that")
            else:
                train_blocks = stored_blocks("train", data_args.max_train_samples)
        if training_args.do_eval:
            eval_blocks = stored_blocks("validation", data_args.max_eval_samples)
    sizes = {
        name: blocks.total_tokens
        for name, blocks in (("training", train_blocks), ("validation", eval_blocks))
        if isinstance(blocks, TokenBlocks)
    }
    for name, blocks in (("training", train_blocks), ("validation", eval_blocks)):
        if isinstance(blocks, TokenBlocks):
            check_same(blocks.total_tokens, f"the number of tokens of the {name} text")
            if len(blocks) == 0:
                raise UsageError(_too_short(name, sizes, block_size, data_args))
            blocks[0]  # finds tokens of another vocabulary before a model is made
            rest = f"; {blocks.dropped_tokens} tokens after the last complete block are not used"
            logger.info(
                f"{name}: {blocks.total_tokens:,} tokens, {len(blocks):,} blocks of {block_size}"
                + ("" if data_args.streaming else rest)
            )
    return train_blocks, eval_blocks


def _too_short(name: str, sizes: dict[str, int], block_size: int, data_args: DataTrainingArguments) -> str:
    """In words, that a split has fewer tokens than a block, and everything that would work.

    Args:
        name: "training" or "validation".
        sizes: tokens of the splits that the run uses.
    """
    own = data_args.validation_file or data_args.dataset_name
    share = f" ({data_args.validation_split_percentage} per cent of the rows)" * (name == "validation" and not own)
    text = f"--block_size {block_size}: the {name} text{share} has only {sizes[name]} tokens"
    largest = min(sizes.values())
    ways = [f"--block_size {largest}{' or less' * (largest > 2)}"] if largest >= 2 else []
    if name == "validation" and not own:
        ways.append("--validation_file with more text")
        # Rows differ in length: a quarter more than a block, on either side.
        percentage = math.ceil(125 * block_size / sum(sizes.values()))
        if "training" in sizes and percentage <= 50:
            ways.append(f"--validation_split_percentage {percentage}")
        if sum(sizes.values()) >= block_size:
            ways.append("--validation_split_percentage 0 to train without evaluation")
    return f"{text}; give {', or '.join(ways) if ways else 'more text'}"
