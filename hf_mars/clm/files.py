"""Files of texts and of tokens: by their names, which can be read and how."""

import glob
from pathlib import Path

from .errors import UsageError

FILE_FORMATS = {".txt": "text", ".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".bz2", ".xz")
TOKEN_BIN = ".bin"


def file_format(path: str, argument: str) -> str:
    """The `datasets` builder for a file, a compressed file or a glob pattern.

    Raises:
        UsageError: no such file, nothing in it, or its suffix is none of FILE_FORMATS (and none of these before one
            of COMPRESSIONS).
    """
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    suffix = next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSIONS), "")
    if suffix not in FILE_FORMATS:
        raise UsageError(
            f"{argument} {path}: cannot read files of this kind; the name must end in one of "
            f"{', '.join(FILE_FORMATS)}, with or without {', '.join(COMPRESSIONS)} after it, or in {TOKEN_BIN}"
        )
    if not matching_files(path):
        raise UsageError(f"{argument} {path}: there is no such file")
    if not any(Path(name).stat().st_size for name in matching_files(path)):
        raise UsageError(f"{argument} {path}: is empty")
    return FILE_FORMATS[suffix]


def matching_files(path: str) -> list[str]:
    """The absolute names of the files that a name or a glob pattern stands for."""
    names = [path] if Path(path).is_file() else sorted(glob.glob(path, recursive=True))
    return [str(Path(name).resolve()) for name in names if Path(name).is_file()]  # no folders, no dead links


def is_token_bin(path: str | None) -> bool:
    """Whether a file is one of token ids, by its name."""
    return path is not None and path.lower().endswith(TOKEN_BIN)
