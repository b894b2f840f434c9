"""The user's command, started so that its script knows MARS's names and writes a run's log."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from .errors import SweepError

# python's own options that take the next argument as their value.
_PYTHON_VALUES = ("-W", "-X", "--check-hash-based-pycs")
_LAUNCHER_MODULES = ("torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch")
_HOW = (
    "write it as `python script.py …`, `python -m module …`, `accelerate launch script.py …` or `torchrun script.py …`"
)


def through_hf_mars(command: Sequence[str]) -> list[str]:
    """Insert `-m hf_mars` before the script or module that `command` runs, unless it is there already.

    Raises:
        SweepError: it is not to be seen where the script begins.
    """
    command = list(command)
    if not command:
        raise SweepError("after -- comes the command to compare optimizers with, such as `-- python train.py …`")
    if any(command[i : i + 2] == ["-m", "hf_mars"] for i in range(len(command))):
        return command
    for i, word in enumerate(command):
        program = PurePath(word).name
        if re.fullmatch(r"python[\d.]*(\.exe)?", program):
            return _after_python(command, i + 1)
        if program == "torchrun":
            return _after_launcher(command, i + 1)
        if program == "accelerate" and command[i + 1 : i + 2] == ["launch"]:
            return _after_launcher(command, i + 2)
    raise SweepError(f"cannot see where the script begins in `{' '.join(command)}`: {_HOW}")


def _after_python(command: list[str], i: int) -> list[str]:
    while i < len(command) and command[i].startswith("-") and command[i] not in ("-m", "-c", "-"):
        i += 2 if command[i] in _PYTHON_VALUES else 1
    if i >= len(command) or command[i] in ("-c", "-") or command[i:] == ["-m"]:
        raise SweepError(f"`{' '.join(command)}` runs no script and no module: {_HOW}")
    if command[i] == "-m" and command[i + 1] in _LAUNCHER_MODULES:
        return _after_launcher(command, i + 2)
    return [*command[:i], "-m", "hf_mars", *command[i:]]


def _after_launcher(command: list[str], start: int) -> list[str]:
    """The launchers' options are many; a script is known by its suffix, a module by the -m before it."""
    for i in range(start, len(command)):
        if command[i] in ("-m", "--module") and i + 1 < len(command):
            return [*command[:i], "-m", "hf_mars", "-m", *command[i + 1 :]]
        if command[i].endswith(".py"):
            return [*command[:i], "-m", "hf_mars", *command[i:]]
    raise SweepError(f"cannot see where the script begins in `{' '.join(command)}`: {_HOW}")


def given_twice(command: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of the argument `names` (without dashes) that the command has too; both spellings count."""
    own = {word.split("=")[0][2:].replace("-", "_") for word in command if word.startswith("--")}
    return [name for name in names if name in own]
