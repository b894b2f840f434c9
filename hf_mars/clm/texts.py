"""Texts: loaded from files, from a data set of the Hub or from the package, and split for training and validation."""

from __future__ import annotations

import contextlib
import glob
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import datasets

from .errors import UsageError
from .files import file_format, matching_files
from .log import logger

ROWS_PER_BATCH = 1000
# A stream has no known length: shares of it, and a tokenizer's training, count on this many rows.
STREAM_WINDOW = 10_000

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset


def packaged_novel() -> Path:
    """The path of *Pride and Prejudice*, the text that comes with the package."""
    # Not in this folder: a data set is cached by the path of its file, which thus stays where earlier versions had it.
    return Path(__file__).parent.parent / "data" / "pride_and_prejudice.txt"


@contextlib.contextmanager
def _reading(source: str) -> Iterator[None]:
    """Turns the errors of `datasets` into UsageErrors, be a source read at once or as a stream."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # each format and compression fails in its own way
        is_wrapped = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = (is_wrapped and error.__cause__) or error
        raise UsageError(f"{source}: cannot be read: {cause or 'it is empty'}") from error


@dataclass(frozen=True)
class Texts:
    """The texts of one split.

    Attributes:
        rows: a data set with one column, "text". None in it stands for an empty text.
        joiner: None where each row is a document of its own (it gets the tokenizer's special tokens, if it adds any).
            A string where the rows are the lines of one running text, which this string joins.
        append_eos: whether the tokenizer's end-of-text token follows each document.
        source: the name of the texts in messages.
    """

    rows: Rows
    joiner: str | None = None
    append_eos: bool = False
    source: str = "the texts"

    @property
    def is_stream(self) -> bool:
        """Whether the texts are read while they are used, so that their number is not known."""
        return isinstance(self.rows, datasets.IterableDataset)

    def batches(self, max_rows: int | None = None) -> Iterator[list[str]]:
        """The strings to tokenise, ROWS_PER_BATCH rows at a time, of the first max_rows rows."""
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
    novel. In files and data sets the texts are in the column text_column; if that is None, in "text", else in the
    first column of strings.

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
    data_files = {"train": [glob.escape(name) for name in matching_files(path)]}
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


def _text_column(rows: Rows, column: str | None, source: str) -> Rows:
    """Keep the column of texts alone, under the name "text"."""
    features = rows.features
    if features is None:  # some streams know theirs only after the first row
        first: dict[str, Any] = next(iter(rows), {})
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
