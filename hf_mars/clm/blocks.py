"""From texts or token files to blocks of tokens.

No text is lost on the way. The tokens of one split form one sequence, in the order of the texts, and blocks are cut
from it without regard to where texts or batches end; only the last, incomplete block stays unused, and its size is
reported.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import numpy.typing as npt
import torch
from datasets.fingerprint import Hasher

from .errors import UsageError
from .log import logger
from .texts import ROWS_PER_BATCH, Texts, join_rows
from .token_bins import TokenBins

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A tokenizer's threads share out strings, and the lines of ROWS_PER_BATCH rows are a single one.
STRINGS_PER_BATCH_OF_LINES = 16

# Part of the key by which tokens are found in the cache of `datasets`. It is the name that this module had when the
# first tokens were cached, and stays, so that they are found. Tokens that are made differently need another name.
CACHE_FORMAT = "hf_mars.corpus"


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> str:
    """The smallest of the dtypes "uint16" and "int32" that holds every id of a tokenizer."""
    return "uint16" if len(tokenizer) <= 2**16 else "int32"


def tokenize(
    strings: list[str], tokenizer: PreTrainedTokenizerBase, joiner: str | None, append_eos: bool
) -> list[npt.NDArray[Any]]:
    """The token ids of each string that join_rows returned: 1-D arrays of token_dtype.

    Lines of a running text get no special tokens: its lines do not begin or end anything. With append_eos each
    document that is not empty ends with one eos token, the tokenizer's own or ours.
    """
    encoded = tokenizer(
        strings,
        add_special_tokens=joiner is None,
        return_attention_mask=False,
        verbose=False,  # texts longer than the model's context are expected: they are cut into blocks
    )
    if append_eos:
        for ids in encoded["input_ids"]:
            if ids and ids[-1] != tokenizer.eos_token_id:
                ids.append(tokenizer.eos_token_id)
    return [np.asarray(ids, dtype=token_dtype(tokenizer)) for ids in encoded["input_ids"]]


def _tokenize_rows(
    batch: dict[str, list[Any]], joiner: str | None, append_eos: bool, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[npt.NDArray[Any]]]:
    return {"input_ids": tokenize(join_rows(batch["text"], joiner), tokenizer, joiner, append_eos)}


class TokenBlocks(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Blocks of block_size tokens, cut from the tokens of all texts in a row.

    Item i is {"input_ids": int64 tensor of shape (block_size,)}. The tokens stay in a memory-mapped file, the Arrow
    file that `datasets` keeps in its cache or a token file; a block is copied out when it is asked for, so neither the
    number of tokens nor the block size costs memory or a second file.

    Args:
        tokens: a data set whose column "input_ids" holds lists of token ids, of any lengths; or token files.
        block_size: tokens per block.
        max_blocks: use only the first max_blocks blocks.

    Attributes:
        total_tokens: the tokens in the data set.
        dropped_tokens: those after the last complete block, in no block whatever max_blocks is.
    """

    def __init__(self, tokens: datasets.Dataset | TokenBins, block_size: int, max_blocks: int | None = None):
        self.tokens = tokens
        self.block_size = block_size
        self.max_blocks = max_blocks
        if isinstance(tokens, TokenBins):
            self._chunks = tokens.chunks()
        else:
            column = tokens.with_format("arrow")[:]["input_ids"]
            self._chunks = [chunk.flatten().to_numpy() for chunk in column.chunks]
        # The position of each chunk's first token in the whole, and the end of the whole.
        self._starts = np.cumsum([0] + [len(chunk) for chunk in self._chunks])
        self.total_tokens = int(self._starts[-1])
        self.dropped_tokens = self.total_tokens % block_size
        blocks = self.total_tokens // block_size
        self._length = blocks if max_blocks is None else min(blocks, max_blocks)

    @classmethod
    def from_texts(
        cls,
        texts: Texts,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        *,
        max_blocks: int | None = None,
        num_proc: int | None = None,
        overwrite_cache: bool = False,
        description: str = "Tokenising",
    ) -> TokenBlocks:
        """Tokenise texts in num_proc processes, or take their tokens from the cache of `datasets`.

        The cache knows the texts and the tokenizer by content: another run, another process or another block size
        finds the same tokens again. A stream is tokenised into memory, up to max_blocks.
        """
        if texts.is_stream:
            stream = TokenStream(texts, tokenizer, block_size, max_blocks)
            blocks = [block["input_ids"].numpy() for block in stream]
            features = datasets.Features(input_ids=datasets.Sequence(datasets.Value(token_dtype(tokenizer))))
            return cls(datasets.Dataset.from_dict({"input_ids": blocks}, features=features), block_size)
        # The tokenizer's own pickle tells where it was loaded from; the tokens depend on its content alone.
        content = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer
        eos = tokenizer.eos_token_id if texts.append_eos else None
        tokens = texts.rows.map(
            _tokenize_rows,
            batched=True,
            batch_size=ROWS_PER_BATCH * (1 if texts.joiner is None else STRINGS_PER_BATCH_OF_LINES),
            num_proc=num_proc,
            remove_columns=texts.rows.column_names,
            fn_kwargs={"joiner": texts.joiner, "append_eos": texts.append_eos, "tokenizer": tokenizer},
            features=datasets.Features(input_ids=datasets.Sequence(datasets.Value(token_dtype(tokenizer)))),
            load_from_cache_file=not overwrite_cache,
            new_fingerprint=Hasher.hash((CACHE_FORMAT, texts.rows._fingerprint, texts.joiner, eos, content)),
            desc=description,
        )
        return cls(tokens, block_size, max_blocks)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if not 0 <= i < self._length:
            raise IndexError(f"block {i} of {self._length}")
        position, end = i * self.block_size, (i + 1) * self.block_size
        block = np.empty(self.block_size, dtype=np.int64)
        filled = 0
        chunk = int(np.searchsorted(self._starts, position, side="right")) - 1
        while position < end:
            part = self._chunks[chunk][position - self._starts[chunk] : end - self._starts[chunk]]
            block[filled : filled + len(part)] = part
            filled += len(part)
            position += len(part)
            chunk += 1
        if isinstance(self.tokens, TokenBins) and (largest := int(block.max())) >= self.tokens.vocab_size:
            raise UsageError(
                f"{', '.join(self.tokens.paths)}: holds token id {largest}, but the model's embedding has "
                f"{self.tokens.vocab_size} rows; give the configuration of the vocabulary that the file was made with"
            )
        return {"input_ids": torch.from_numpy(block)}

    def __reduce__(self) -> tuple[Any, ...]:
        # A data loader's worker opens the memory map anew instead of receiving the tokens.
        return type(self), (self.tokens, self.block_size, self.max_blocks)


class TokenStream(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """Blocks of block_size tokens, made while the texts are read; each pass starts at the first text.

    Yields {"input_ids": int64 tensor of shape (block_size,)}. The workers of a data loader read different shards
    (files) of the texts; each leaves at most one incomplete block unused. With max_blocks, a pass ends after that many
    blocks, shared out equally among the workers.
    """

    def __init__(
        self, texts: Texts, tokenizer: PreTrainedTokenizerBase, block_size: int, max_blocks: int | None = None
    ):
        self.texts = texts
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.max_blocks = max_blocks

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        limit = self.max_blocks
        worker = torch.utils.data.get_worker_info()
        if limit is not None and worker is not None:
            limit = limit // worker.num_workers + (worker.id < limit % worker.num_workers)
        return itertools.islice(self._blocks(), limit)

    def _blocks(self) -> Iterator[dict[str, torch.Tensor]]:
        rest = np.empty(0, dtype=np.int64)
        for strings in self.texts.batches():
            tokens = tokenize(strings, self.tokenizer, self.texts.joiner, self.texts.append_eos)
            rest = np.concatenate([rest, *tokens], dtype=np.int64)
            complete = len(rest) - len(rest) % self.block_size
            for start in range(0, complete, self.block_size):
                yield {"input_ids": torch.from_numpy(rest[start : start + self.block_size].copy())}
            rest = rest[complete:]
        logger.info(f"end of the stream: {len(rest)} tokens after the last complete block are not used")


def collate_blocks(blocks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch for a causal language model: input_ids and labels, int64 of shape (blocks, block_size), equal.

    The model itself compares position i with label i + 1.
    """
    input_ids = torch.stack([block["input_ids"] for block in blocks])
    return {"input_ids": input_ids, "labels": input_ids.clone()}
