"""From texts to blocks of tokens: loading, splitting, training a tokenizer, tokenising, packing.

    load_texts   files, a data set of the Hub or the packaged novel → Texts for training and for validation
    train_bpe    Texts → a byte-level BPE
    TokenBins    token files as nanoGPT writes them, for those who have tokenised already
    TokenBlocks  Texts or TokenBins → blocks of block_size tokens, map-style: a view of tokens memory-mapped on disk
    TokenStream  the same for streaming: tokenised while it is read

No text is lost on the way. The tokens of one split form one sequence, in the order of the texts, and blocks are cut
from it without regard to where texts or batches end; only the last, incomplete block stays unused, and its size is
reported.
"""

import contextlib
import glob
import itertools
import logging
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.fingerprint import Hasher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

logger = logging.getLogger(__name__)

FILE_FORMATS = {".txt": "text", ".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".bz2", ".xz")
TOKEN_BIN = ".bin"

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCAB_SIZE = 257  # the 256 bytes and END_OF_TEXT

ROWS_PER_BATCH = 1000
# A tokenizer's threads share out strings, and the lines of ROWS_PER_BATCH rows are a single one.
STRINGS_PER_BATCH_OF_LINES = 16
# A stream has no known length, so what depends on the amount of text looks at this many rows of it.
STREAM_WINDOW = 10_000


class UsageError(ValueError):
    """What the user asked for cannot work. The message names the argument, its value and what is allowed."""


def packaged_novel() -> Path:
    """The path of *Pride and Prejudice*, the text that comes with the package."""
    return Path(__file__).parent / "data" / "pride_and_prejudice.txt"


# ---- texts ----


@contextlib.contextmanager
def _reading(source: str) -> Iterator[None]:
    """What goes wrong while `datasets` reads a source, be it all of it at once or a stream, becomes a UsageError."""
    try:
        yield
    except UsageError:
        raise
    # Each format and compression fails in its own way: arrow and pandas with ValueErrors, scripts with RuntimeErrors.
    except (
        OSError,
        EOFError,
        ValueError,
        RuntimeError,
        lzma.LZMAError,
        zlib.error,
        datasets.exceptions.DatasetsError,
    ) as error:
        is_wrapped = isinstance(error, datasets.exceptions.DatasetGenerationError)
        raise UsageError(f"{source}: cannot be read: {(is_wrapped and error.__cause__) or error}") from error


@dataclass(frozen=True)
class Texts:
    """The texts of one split.

    Attributes:
        rows: a data set with one column, "text". None in it stands for an empty text.
        joiner: None where each row is a document of its own (it gets the tokenizer's special tokens, if it adds any).
            A string where the rows are the lines of one running text, which this string joins.
        append_eos: whether the tokenizer's end-of-text token follows each document.
        source: what messages call the texts.
    """

    rows: datasets.Dataset | datasets.IterableDataset
    joiner: str | None = None
    append_eos: bool = False
    source: str = "the texts"

    @property
    def is_stream(self) -> bool:
        return isinstance(self.rows, datasets.IterableDataset)

    def batches(self, max_rows: int | None = None) -> Iterator[list[str]]:
        """What to tokenise, ROWS_PER_BATCH rows at a time, of the first max_rows rows."""
        with _reading(self.source):
            rows = itertools.islice(self.rows, max_rows)
            while batch := list(itertools.islice(rows, ROWS_PER_BATCH)):
                yield join_rows([row["text"] for row in batch], self.joiner)


def join_rows(rows: list[str | None], joiner: str | None) -> list[str]:
    """The strings to tokenise for consecutive rows: each document, or the running text of each ROWS_PER_BATCH rows."""
    texts = [text or "" for text in rows]
    if joiner is None:
        return texts
    batches = (texts[start : start + ROWS_PER_BATCH] for start in range(0, len(texts), ROWS_PER_BATCH))
    return ["".join(text + joiner for text in batch) for batch in batches]


def file_format(path: str, argument: str) -> str:
    """The `datasets` builder for a file, a compressed file or a glob pattern.

    Raises:
        UsageError: no such file, or its suffix is none of FILE_FORMATS (and none of these before one of COMPRESSIONS).
    """
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    suffix = next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSIONS), "")
    if suffix not in FILE_FORMATS:
        raise UsageError(
            f"{argument} {path}: cannot read files of this kind; the name must end in one of "
            f"{', '.join(FILE_FORMATS)}, with or without {', '.join(COMPRESSIONS)} after it, or in {TOKEN_BIN}"
        )
    if not _files(path):
        raise UsageError(f"{argument} {path}: there is no such file")
    return FILE_FORMATS[suffix]


def _files(path: str) -> list[str]:
    """The absolute names of the files that a name or a glob pattern stands for."""
    names = [path] if Path(path).is_file() else sorted(glob.glob(path, recursive=True))
    return [str(Path(name).resolve()) for name in names]


def load_texts(
    *,
    train_file: str | None = None,
    validation_file: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    streaming: bool = False,
    validation_split_percentage: int = 5,
    keep_linebreaks: bool = True,
    text_column: str | None = None,
    append_eos: bool = False,
    cache_dir: str | None = None,
    token: str | None = None,
) -> dict[str, Texts]:
    """Load the texts of the splits "train" and "validation", as far as there are any.

    The source is a data set of the Hub (or a local folder of one), local files, or, when none is named, the packaged
    novel. In files and data sets the text is text_column: if not given, "text", else the first column of strings.

    Without validation texts of its own, a source is split. The last validation_split_percentage per cent of the rows
    (of a text file: lines) are held out: a tail, since neighbouring rows of shuffled texts would tell on each other.
    A stream has no known end: there the first rows are held out, that percentage of STREAM_WINDOW rows. Every row is
    in exactly one split; with 0 per cent there is no validation split.

    Raises:
        UsageError: files or data set that cannot be read or hold no text, or too few rows to split; append_eos for a
            running text, whose lines are no documents.
    """
    if dataset_name is not None:
        splits = _load_hub(dataset_name, dataset_config_name, streaming, text_column, cache_dir, token)
    else:
        if train_file is None and validation_file is None:
            train_file = str(packaged_novel())
        files = {"train": ("--train_file", train_file), "validation": ("--validation_file", validation_file)}
        splits = {
            split: _load_file(argument, path, streaming, keep_linebreaks, text_column, cache_dir)
            for split, (argument, path) in files.items()
            if path is not None
        }
    if append_eos:
        for texts in splits.values():
            if texts.joiner is not None:
                raise UsageError(
                    "--append_eos: the lines of a txt file are one running text, not documents; "
                    "give files with a document a row (csv, json, jsonl, parquet), or drop it"
                )
        splits = {split: replace(texts, append_eos=True) for split, texts in splits.items()}
    if "validation" not in splits and validation_split_percentage > 0:
        splits["train"], splits["validation"] = _hold_out(splits["train"], validation_split_percentage)
    return splits


def _load_file(
    argument: str, path: str, streaming: bool, keep_linebreaks: bool, text_column: str | None, cache_dir: str | None
) -> Texts:
    builder = file_format(path, argument)
    options: dict[str, Any] = {}
    if builder == "text":
        options["keep_linebreaks"] = keep_linebreaks
    elif builder == "csv":
        # pandas reads words such as "NA" and "null" as missing; they are text here.
        options.update(keep_default_na=False, na_values=[""])
    # `datasets` reads every name as a pattern.
    data_files = {"train": [glob.escape(name) for name in _files(path)]}
    source = f"{argument} {path}"
    with _reading(source):
        rows = datasets.load_dataset(
            builder, data_files=data_files, split="train", streaming=streaming, cache_dir=cache_dir, **options
        )
        rows = _text_column(rows, text_column, source)
    joiner = None if builder != "text" else "" if keep_linebreaks else " "
    return Texts(rows, joiner=joiner, source=source)


def _load_hub(
    name: str,
    config_name: str | None,
    streaming: bool,
    text_column: str | None,
    cache_dir: str | None,
    token: str | None,
) -> dict[str, Texts]:
    source = f"--dataset_name {name}" + (f" --dataset_config_name {config_name}" if config_name else "")
    with _reading(source):
        loaded = datasets.load_dataset(name, config_name, streaming=streaming, cache_dir=cache_dir, token=token)
        splits = [split for split in ("train", "validation") if split in loaded]
        if not splits:
            raise UsageError(f"{source}: has no split named train or validation, only {', '.join(loaded)}")
        return {split: Texts(_text_column(loaded[split], text_column, source), source=source) for split in splits}


def _text_column(rows: datasets.Dataset | datasets.IterableDataset, column: str | None, source: str):
    """Keep the column of texts alone, under the name "text"."""
    features = rows.features
    if features is None:  # some streams know theirs only after the first row
        first = next(iter(rows), {})
        features = {name: datasets.Value("string") for name, value in first.items() if isinstance(value, str)}
        names = list(first)
    else:
        names = list(features)
    strings = [name for name in names if getattr(features.get(name), "dtype", None) in ("string", "large_string")]
    if not strings:
        raise UsageError(f"{source}: there is no column of strings; the columns are: {', '.join(names) or 'none'}")
    if column is None:
        column = "text" if "text" in strings else strings[0]
    elif column not in strings:
        raise UsageError(f"--text_column {column}: {source} has no such column of strings, only {', '.join(strings)}")
    if len(names) > 1:
        logger.info(f"{source}: reading the column {column!r} of {', '.join(names)}")
    rows = rows.select_columns(column)
    return rows if column == "text" else rows.rename_column(column, "text")


def _hold_out(texts: Texts, percentage: int) -> tuple[Texts, Texts]:
    """Split into (training, validation) as load_texts describes."""
    rows = texts.rows
    if texts.is_stream:
        held_out = STREAM_WINDOW * percentage // 100
        logger.info(f"validation: the first {held_out:,} rows of the stream; training: all the others")
        train, validation = rows.skip(held_out), rows.take(held_out)
        rest = (
            f"{texts.source} after its first {held_out} rows, held out by --validation_split_percentage {percentage},"
        )
        return replace(texts, rows=train, source=rest), replace(texts, rows=validation)
    held_out = -(-len(rows) * percentage // 100)
    if held_out >= len(rows):
        raise UsageError(
            f"--validation_split_percentage {percentage}: {len(rows)} row(s) of text cannot be split; "
            "give --validation_file, or 0 for no validation"
        )
    logger.info(f"validation: the last {held_out:,} of {len(rows):,} rows; training: all the others")
    first = len(rows) - held_out
    train, validation = rows.select(range(first)), rows.select(range(first, len(rows)))
    return replace(texts, rows=train), replace(texts, rows=validation)


# ---- token files ----


@dataclass(frozen=True)
class TokenBins:
    """The token ids of one split, in files as nanoGPT writes them: uint16 in the machine's byte order, no header.

    Attributes:
        paths: the files, in order.
        start, stop: the range of tokens that belongs to the split, counted over all files.
        vocab_size: what every token id must be smaller than. It is checked as blocks are read, not by reading all.
    """

    paths: tuple[str, ...]
    start: int
    stop: int
    vocab_size: int

    @classmethod
    def open(cls, path: str, argument: str, vocab_size: int) -> "TokenBins":
        """All tokens of a file, or of the files of a glob pattern.

        Raises:
            UsageError: no such file, an empty one, or one whose size is not a whole number of tokens.
        """
        paths = _files(path)
        if not paths:
            raise UsageError(f"{argument} {path}: there is no such file")
        sizes = [Path(name).stat().st_size for name in paths]
        for name, size in zip(paths, sizes, strict=True):
            if size == 0 or size % 2:
                raise UsageError(f"{argument} {name}: {size} bytes are no tokens of 2 bytes each (uint16)")
        return cls(tuple(paths), 0, sum(sizes) // 2, vocab_size)

    def chunks(self) -> list[np.ndarray]:
        """The tokens as memory-mapped arrays of uint16: nothing is read before it is used."""
        chunks, first = [], 0
        for path in self.paths:
            tokens = np.memmap(path, dtype=np.uint16, mode="r")
            chunks.append(tokens[max(self.start - first, 0) : max(self.stop - first, 0)])
            first += len(tokens)
        return chunks


def is_token_bin(path: str | None) -> bool:
    return path is not None and path.lower().endswith(TOKEN_BIN)


def load_token_bins(
    train_file: str | None, validation_file: str | None, validation_split_percentage: int, vocab_size: int
) -> dict[str, TokenBins]:
    """The splits "train" and "validation", as far as there are any, split as load_texts does: at the tail.

    Raises:
        UsageError: see TokenBins.open.
    """
    files = {"train": train_file, "validation": validation_file}
    splits = {
        split: TokenBins.open(path, f"--{split}_file", vocab_size) for split, path in files.items() if path is not None
    }
    if "validation" not in splits and validation_split_percentage > 0:
        tokens = splits["train"].stop
        held_out = -(-tokens * validation_split_percentage // 100)
        logger.info(f"validation: the last {held_out:,} of {tokens:,} tokens; training: all the others")
        first = tokens - held_out
        whole = splits["train"]
        splits["train"], splits["validation"] = replace(whole, stop=first), replace(whole, start=first)
    return splits


# ---- tokenizer ----


def train_bpe(texts: Texts, vocab_size: int, *, show_progress: bool = False) -> Tokenizer:
    """Train a byte-level BPE, as GPT-2's: it can write any text, and END_OF_TEXT is its token 0.

    Args:
        texts: all of it is used; of a stream, the first STREAM_WINDOW rows.
        vocab_size: the size to reach. The result is smaller where the text has fewer pairs to merge.

    Raises:
        UsageError: vocab_size is below SMALLEST_VOCAB_SIZE.
    """
    if vocab_size < SMALLEST_VOCAB_SIZE:
        raise UsageError(
            f"--vocab_size {vocab_size}: must be at least {SMALLEST_VOCAB_SIZE}, for the 256 bytes and {END_OF_TEXT}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    batches = texts.batches(STREAM_WINDOW if texts.is_stream else None)
    tokenizer.train_from_iterator(batches, trainer)
    return tokenizer


# ---- tokens ----


def token_dtype(tokenizer) -> str:
    """The smallest of the dtypes "uint16" and "int32" that holds every id of a tokenizer."""
    return "uint16" if len(tokenizer) <= 2**16 else "int32"


def tokenize(strings: list[str], tokenizer, joiner: str | None, append_eos: bool) -> list[np.ndarray]:
    """The token ids of each string that join_rows returned, 1-D arrays of token_dtype.

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


def _tokenize_rows(batch: dict[str, list], joiner: str | None, append_eos: bool, tokenizer):
    return {"input_ids": tokenize(join_rows(batch["text"], joiner), tokenizer, joiner, append_eos)}


class TokenBlocks(torch.utils.data.Dataset):
    """Blocks of block_size tokens, cut from the tokens of all texts in a row.

    Item i is {"input_ids": int64 tensor of shape (block_size,)}. The tokens stay in a memory-mapped file, the Arrow
    file that `datasets` keeps in its cache or a token file; a block is copied out when it is asked for, so neither the
    number of tokens nor the block size costs memory or a second file.

    Args:
        tokens: a data set whose column "input_ids" holds lists of token ids, of any lengths; or token files.
        block_size: tokens a block.
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
        tokenizer,
        block_size: int,
        *,
        max_blocks: int | None = None,
        num_proc: int | None = None,
        overwrite_cache: bool = False,
        description: str = "Tokenising",
    ) -> "TokenBlocks":
        """Tokenise texts in num_proc processes, or take their tokens from the cache of `datasets`.

        The cache knows the texts and the tokenizer by content: another run, another process or another block size
        finds the same tokens again. A stream is tokenised into memory, up to max_blocks.
        """
        if texts.is_stream:
            stream = TokenStream(texts, tokenizer, block_size, max_blocks)
            blocks = [block["input_ids"].numpy() for block in stream]
            features = datasets.Features(input_ids=datasets.Sequence(datasets.Value(token_dtype(tokenizer))))
            return cls(datasets.Dataset.from_dict({"input_ids": blocks}, features=features), block_size)
        # The tokenizer's own pickle tells where it was loaded from; its content is what decides the tokens.
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
            new_fingerprint=Hasher.hash(("hf_mars.corpus", texts.rows._fingerprint, texts.joiner, eos, content)),
            desc=description,
        )
        return cls(tokens, block_size, max_blocks)

    def __len__(self):
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

    def __reduce__(self):
        # A data loader's worker opens the memory map anew instead of receiving the tokens.
        return type(self), (self.tokens, self.block_size, self.max_blocks)


class TokenStream(torch.utils.data.IterableDataset):
    """Blocks of block_size tokens, made while the texts are read; each pass starts at the first text.

    Yields {"input_ids": int64 tensor of shape (block_size,)}. The workers of a data loader read different shards
    (files) of the texts; each leaves at most one incomplete block unused. With max_blocks, a pass ends after that many
    blocks, shared out equally among the workers.
    """

    def __init__(self, texts: Texts, tokenizer, block_size: int, max_blocks: int | None = None):
        self.texts = texts
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.max_blocks = max_blocks

    def __iter__(self):
        limit = self.max_blocks
        worker = torch.utils.data.get_worker_info()
        if limit is not None and worker is not None:
            limit = limit // worker.num_workers + (worker.id < limit % worker.num_workers)
        return itertools.islice(self._blocks(), limit)

    def _blocks(self):
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
