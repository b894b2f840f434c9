"""What is wrong with a command line, as far as that shows before torch and transformers are imported.

Those take seconds; this takes a tenth of one. What passes here is checked again in full (`command_line`, `checks`).
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from hf_mars.trainer.names import DEFAULT, OPTIM_ARGS, VARIANTS, nearest_optimizer
from hf_mars.trainer.optim_args import entries

from .argument_files import values_of_file
from .arguments import DataTrainingArguments, ModelArguments, RunArguments
from .errors import UsageError
from .files import file_format, is_token_bin

ARGUMENT_FILES = (".json", ".yaml", ".yml")
# Of MarsTrainingArguments, and argparse's own.
_OURS = {"mars_diagnostics", "max_skipped_steps", "checkpoint_checksums", "fuse_clip", "help"}
# What DeepSpeed asks for in the environment.
_OF_A_LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
# Arguments that take the name of a model or data set on the Hub, or a local folder.
_HUB_OR_FOLDER = ("model_name_or_path", "config_name", "tokenizer_name", "dataset_name")


def check_words(argv: list[str]) -> None:
    """Raise UsageError for the first thing in the words of a command line that cannot work.

    Args:
        argv: as for `command_line.parse_arguments`.
    """
    given = dict(words_given(argv))
    names = _names()
    for name, value in given.items():
        if names and not _is_known(name, names):
            raise unknown_argument(name, value, names)
    optim = given.get("optim")
    if optim is not None and "mars" in optim.lower() and optim not in VARIANTS:
        raise UsageError(f"--optim {optim}: {nearest_optimizer(optim)}")
    if (name := optim or DEFAULT) in VARIANTS:
        try:
            entries(given.get("optim_args"), name)
        except ValueError as error:
            raise UsageError(str(error)) from None
    if given.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise UsageError(f"--deepspeed {given['deepspeed']}: needs the package deepspeed: pip install deepspeed")
    is_launched = _OF_A_LAUNCHER <= os.environ.keys() or importlib.util.find_spec("mpi4py") is not None
    if given.get("deepspeed") and not is_launched:  # DeepSpeed would then ask MPI
        raise UsageError(
            f"--deepspeed {given['deepspeed']}: needs a launcher, for one process too: torchrun --nproc_per_node 1, "
            "accelerate launch or deepspeed"
        )
    _check_deepspeed_file(given.get("deepspeed"))
    if os.environ.get("WORLD_SIZE", "1") == "1":  # nodes may see different disks: `run.find_start` asks all of them
        _check_files(given)


def _check_deepspeed_file(value: str | None) -> None:
    """DeepSpeed takes base64, too, and its errors do not name the argument."""
    if not value or not (value.endswith(".json") or os.path.exists(value)):
        return
    try:
        json.loads(Path(value).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--deepspeed {value}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--deepspeed {value}: is not valid JSON: {error}") from error


def _check_files(given: dict[str, str | None]) -> None:
    for name in _HUB_OR_FOLDER:
        value = given.get(name)
        if value and _is_a_path(value) and not Path(value).exists():
            raise UsageError(f"--{name} {value}: there is no such folder")
    for name in ("train_file", "validation_file"):
        path = given.get(name)
        if path and not is_token_bin(path):
            file_format(path, f"--{name}")


def unknown_argument(name: str, value: str | None, names: set[str]) -> UsageError:
    """The error for an argument that there is not.

    Args:
        name, value: as given; None without a value.
        names: those that there are.
    """
    if name in OPTIM_ARGS:
        return UsageError(f"unknown argument --{name}; it is one of --optim_args: --optim_args {name}={value or '…'}")
    nearest = difflib.get_close_matches(name, sorted(names.union(OPTIM_ARGS)), n=1, cutoff=0.0)[0]
    words = f"optim_args {nearest}={value or '…'}" if nearest in OPTIM_ARGS and nearest not in names else nearest
    return UsageError(f"unknown argument --{name}; the nearest valid one is --{words}")


def words_given(argv: list[str]) -> Iterator[tuple[str, str | None]]:
    """Names and values, of a file of arguments first; None for an argument without a value."""
    if argv and argv[0].endswith(ARGUMENT_FILES):
        values, argv = values_of_file(Path(argv[0])), argv[1:]
        overridden = any(word.startswith(("--train_file", "--validation_file")) for word in argv)
        for name, value in values.items():
            if value is not None and not (overridden and name in ("dataset_name", "dataset_config_name")):
                yield str(name).replace("-", "_"), value if isinstance(value, str) else None
    for i, word in enumerate(argv):
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            follows = argv[i + 1] if not equals and argv[i + 1 : i + 2] else None
            given = value if equals else follows if follows and not follows.startswith("--") else None
            yield name.replace("-", "_"), given


def _is_known(name: str, names: set[str]) -> bool:
    """Whether argparse knows a name: in full, negated, or its beginning (an ambiguous one it refuses itself)."""
    return any(known.startswith(name) for known in names) or (name.startswith("no_") and name[3:] in names)


def _names() -> set[str]:
    """The names of all arguments; empty where transformers keeps its own in another way than it does up to 5.24."""
    ours = {field.name for cls in (ModelArguments, DataTrainingArguments, RunArguments) for field in fields(cls)}
    theirs = _training_arguments()
    return ours | theirs | _OURS if theirs else set()


@functools.cache
def _training_arguments() -> set[str]:
    """The fields of transformers' TrainingArguments, read off its source: its import is what takes the seconds."""
    spec = importlib.util.find_spec("transformers")
    for folder in (spec and spec.submodule_search_locations) or ():
        source = Path(folder, "training_args.py")
        if source.is_file():
            for node in ast.parse(source.read_bytes()).body:
                if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
                    lines = [line for line in node.body if isinstance(line, ast.AnnAssign)]
                    return {line.target.id for line in lines if isinstance(line.target, ast.Name)}
    return set()


def _is_a_path(value: str) -> bool:
    """Whether a name can only be one of a folder: the Hub's have at most one slash, and begin with a letter."""
    return value.startswith((".", "/", "~")) or value.count("/") > 1
