"""MARS's names in processes that ``multiprocessing`` starts anew ("spawn", "forkserver").

Such a process runs the main script again before it unpickles anything. A script that imports hf_mars needs nothing;
``python -m hf_mars`` runs scripts that do not.
"""

from __future__ import annotations

from multiprocessing import spawn

from .on_import import wrap_once
from .registry import diagnose_every_trainer


class _Import:
    """Unpickled in a child, it imports hf_mars there, and makes the child do the same to its own children."""

    def __init__(self, diagnostics: bool):
        self.diagnostics = diagnostics

    def __reduce__(self):
        return prepare, (self.diagnostics,)


def prepare(diagnostics: bool) -> None:
    """Have the names in this process and in those that are spawned from now on; ``diagnostics``, where True, too."""
    if diagnostics:
        diagnose_every_trainer()

    def with_import(get_preparation_data):
        # The one thing a child unpickles before it runs the main script; keys that it does not know are left alone.
        return lambda name: {**get_preparation_data(name), "hf_mars": _Import(diagnostics)}

    wrap_once(spawn, "get_preparation_data", with_import)
