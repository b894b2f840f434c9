"""MARS's names in processes that ``multiprocessing`` starts anew ("spawn", "forkserver").

Such a process runs the main script again before it unpickles anything. A script that imports hf_mars needs nothing;
``python -m hf_mars`` runs scripts that do not.
"""

from __future__ import annotations

import functools
from multiprocessing import spawn


class _Import:
    """Unpickled in a child, it imports hf_mars there, and makes the child do the same to its own children."""

    def __reduce__(self):
        return register_in_children, ()


def register_in_children() -> None:
    """Make processes that are spawned from now on import hf_mars before their main script."""
    if not hasattr(spawn.get_preparation_data, "_hf_mars"):
        spawn.get_preparation_data = _with_import(spawn.get_preparation_data)


def _with_import(get_preparation_data):
    # The one thing a child unpickles before it runs the main script; keys that it does not know are left alone.
    @functools.wraps(get_preparation_data)
    def with_import(name):
        return {**get_preparation_data(name), "hf_mars": _Import()}

    with_import._hf_mars = True
    return with_import
