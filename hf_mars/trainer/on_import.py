"""Changing modules of other packages without importing them before someone needs them.

What a library imports reads environment variables, takes seconds, and is not for hf_mars to decide: scripts set the
variables first, and worker processes need no torch.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

_changes: dict[str, Callable[[ModuleType], None]] = {}


def when_imported(name: str, change: Callable[[ModuleType], None]) -> None:
    """Call ``change`` with the module ``name``: now if it has been imported, else as part of its import.

    Args:
        name: a module.
        change: may be called more than once for one module. What it imports must not import the module.
    """
    _changes[name] = change
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    if name in sys.modules:
        change(import_module(name))  # waits for a thread that is still executing it


class _Finder:
    """Finds the modules to be changed, by asking the other finders."""

    def find_spec(self, name, path=None, target=None):
        if name not in _changes:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                spec.loader = _Loader(spec.loader, _changes[name])
                return spec
        return None


class _Loader:
    """A module's own loader, but that the module is changed after it was executed: still within its import."""

    def __init__(self, loader, change):
        self._loader = loader
        self._change = change

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def exec_module(self, module):
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._change(module)


_FINDER = _Finder()


def wrap_once(owner: Any, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Replace the function ``owner.name`` by ``wrapper(function)``, unless that has been done."""
    function = getattr(owner, name)
    if not hasattr(function, "_hf_mars"):
        wrapped = functools.wraps(function)(wrapper(function))
        wrapped._hf_mars = True
        setattr(owner, name, wrapped)
