"""Files of token ids as nanoGPT writes them: uint16 in the machine's byte order, no header."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .errors import UsageError
from .files import matching_files
from .log import logger


@dataclass(frozen=True)
class TokenBins:
    """The token ids of one split, in files as nanoGPT writes them: uint16 in the machine's byte order, no header.

    Attributes:
        paths: the files, in order.
        start, stop: the range of tokens that belongs to the split, counted over all files.
        vocab_size: every token id must be smaller. That is checked as blocks are read, not by reading all of them.
    """

    paths: tuple[str, ...]
    start: int
    stop: int
    vocab_size: int

    @classmethod
    def open(cls, path: str, argument: str, vocab_size: int) -> TokenBins:
        """All tokens of a file, or of the files of a glob pattern.

        Raises:
            UsageError: no such file, an empty one, or one whose size is not a whole number of tokens.
        """
        paths = matching_files(path)
        if not paths:
            raise UsageError(f"{argument} {path}: there is no such file")
        sizes = [Path(name).stat().st_size for name in paths]
        for name, size in zip(paths, sizes, strict=True):
            if size == 0 or size % 2:
                raise UsageError(f"{argument} {name}: {size} bytes are no tokens of 2 bytes each (uint16)")
        return cls(tuple(paths), 0, sum(sizes) // 2, vocab_size)

    def chunks(self) -> list[npt.NDArray[np.uint16]]:
        """The tokens as memory-mapped arrays of uint16: nothing is read before it is used."""
        chunks, first = [], 0
        for path in self.paths:
            tokens = np.memmap(path, dtype=np.uint16, mode="r")
            chunks.append(tokens[max(self.start - first, 0) : max(self.stop - first, 0)])
            first += len(tokens)
        return chunks


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
