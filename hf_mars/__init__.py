"""MARS (arXiv:2411.10438) for the Hugging Face Trainer. Importing the package registers its optimizer names.

It imports neither torch nor transformers: each public name is imported from its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .trainer.registry import register

if TYPE_CHECKING:
    from . import optim
    from .optim import MarsAdamW, MarsLion, MarsShampoo
    from .trainer.arguments import MarsTrainingArguments
    from .trainer.callbacks import MarsDiagnosticsCallback
    from .trainer.param_groups import param_groups
    from .trainer.trainer import MarsTrainer

__version__ = "0.2.0"

__all__ = [
    "MarsAdamW",
    "MarsDiagnosticsCallback",
    "MarsLion",
    "MarsShampoo",
    "MarsTrainer",
    "MarsTrainingArguments",
    "optim",
    "param_groups",
    "register",
]

_MODULES = {
    "MarsAdamW": ".optim",
    "MarsDiagnosticsCallback": ".trainer.callbacks",
    "MarsLion": ".optim",
    "MarsShampoo": ".optim",
    "MarsTrainer": ".trainer.trainer",
    "MarsTrainingArguments": ".trainer.arguments",
    "param_groups": ".trainer.param_groups",
}


def __getattr__(name: str) -> Any:
    if name == "optim":
        return import_module(".optim", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
