"""MARS's names in processes that `multiprocessing` starts anew ("spawn", "forkserver").

Such a process runs the main script again before it unpickles anything. A script that imports hf_mars needs nothing;
`python -m hf_mars` runs scripts that do not.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import spawn
from typing import Any

from .on_import import wrap_once
from .registry import diagnose_every_trainer


class _PreparesWhenUnpickled:
    """Unpickled in a child, it calls `prepare` there: the child imports hf_mars and prepares its own children."""

    def __init__(self, diagnostics: bool):
        self.diagnostics = diagnostics

    def __reduce__(self) -> tuple[Callable[[bool], None], tuple[bool]]:
        return prepare, (self.diagnostics,)


def prepare(diagnostics: bool) -> None:
    """Register the names in processes that this one spawns from now on; importing hf_mars registered them in this one.

    Args:
        diagnostics: also give every Trainer, here and in those processes, a `MarsDiagnosticsCallback`.
    """
    if diagnostics:
        diagnose_every_trainer()

    def with_preparation(get_preparation_data: Callable[[str], dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
        # The one thing a child unpickles before it runs the main script; keys that it does not know are left alone.
        return lambda name: {**get_preparation_data(name), "hf_mars": _PreparesWhenUnpickled(diagnostics)}

    wrap_once(spawn, "get_preparation_data", with_preparation)
