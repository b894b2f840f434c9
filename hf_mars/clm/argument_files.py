"""Files of arguments, yaml or json, and the words of a command line that they stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from .errors import UsageError

# These take "key=value,key=value", which a file may write as a mapping.
KEY_VALUE_ARGUMENTS = ("optim_args", "config_overrides")


class _Loader(yaml.SafeLoader):
    """Reads plain words as YAML 1.2 does, where 1e-5 is a number, and no, yes and 2024-01-01 are words."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for _kind, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def values_of_file(path: Path, included_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The arguments in a json or yaml file, on top of those of the files that its key `include` lists.

    Included files are named relative to the file; of two, the later one counts.

    Raises:
        UsageError: the file, or one that it includes, cannot be read, holds no mapping or includes itself.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file of arguments")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader)  # a SafeLoader
    except RecursionError as error:
        raise UsageError(f"{path}: cannot be read as a file of arguments: it is nested too deeply") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read as a file of arguments: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: must hold one mapping of argument names to values, not a {type(values).__name__}")
    names = values.pop("include", [])
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UsageError(f"{path}: include: {names!r}: must be a list of files")
    merged: dict[str, Any] = {}
    for name in names:
        including = (*included_by, path.resolve())
        if (path.parent / name).resolve() in including:
            raise UsageError(f"{path}: include: {name}: would include itself")
        merged.update(values_of_file(path.parent / name, including))
    return merged | values


def arguments_of(values: dict[str, Any], of_many_values: Collection[str]) -> list[str]:
    """The command line that a mapping of argument names to values stands for.

    Args:
        of_many_values: the names of the arguments that take several words. A list for another one is joined by commas.

    Raises:
        UsageError: an empty list, for which there is no command line, or a value that holds itself.
    """
    argv = []
    for name, value in values.items():
        name = str(name).replace("-", "_")
        if _is_nested(value):
            raise UsageError(f"{name}: is nested too deeply for a value, or holds itself")
        if value == []:
            raise UsageError(f"{name}: []: is an empty list; leave it out for the default")
        if isinstance(value, list) and name in of_many_values:
            argv += [f"--{name}", *map(_word, value)]
        elif isinstance(value, dict) and name not in KEY_VALUE_ARGUMENTS:
            argv.append(f"--{name}={json.dumps(value)}")
        elif value is not None:
            argv.append(f"--{name}={_word(value)}")
    return argv


def _is_nested(value: Any, depth: int = 8) -> bool:
    """Whether a value has more than `depth` levels; one that holds itself (an anchor of yaml) has no end of them."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth == 0 or any(_is_nested(item, depth - 1) for item in items)


def _word(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, dict):
        return ",".join(f"{key}={_word(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ",".join(map(_word, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
