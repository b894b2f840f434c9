"""Changes other packages' modules at the moment when somebody else imports them, never by importing them itself.

The import of a library reads environment variables and takes seconds, and hf_mars has no say in when it happens:
scripts set the variables first, and worker processes need no torch.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec

Change = Callable[[ModuleType], None]

_changes: dict[str, list[Change]] = {}


def when_imported(name: str, change: Change) -> None:
    """Call `change` with the module `name`: now if it has been imported, else as part of its import.

    Args:
        name: a module.
        change: may be called more than once for one module. It must import nothing that imports the module.
    """
    changes = _changes.setdefault(name, [])
    if change not in changes:
        changes.append(change)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    if name in sys.modules:
        change(import_module(name))  # waits for a thread that is still executing it


class _Finder:
    """Finds the modules to be changed, by asking the other finders."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _changes:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                # Not a subclass of Loader, whose methods would hide those of the module's own loader.
                spec.loader = cast("Loader", _ChangingLoader(spec.loader, _changes[name]))
                return spec
        return None


class _ChangingLoader:
    """A module's own loader, except that it changes the module right after its code has run, still in its import."""

    def __init__(self, loader: Any, changes: Sequence[Change]):
        self._loader = loader
        self._changes = changes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        for change in self._changes:
            change(module)


_FINDER = _Finder()


def wrap_once(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function by a wrapped one, unless that has been done.

    Args:
        owner: the module or class that holds the function.
        name: the attribute that the function is.
        wrapper: gets the function, and returns the one to put in its place.
    """
    function = getattr(owner, name)
    if not hasattr(function, "_hf_mars"):
        wrapped: Any = functools.wraps(function)(wrapper(function))
        wrapped._hf_mars = True
        setattr(owner, name, wrapped)
