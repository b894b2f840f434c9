"""MARS (arXiv:2411.10438) for the Hugging Face Trainer. Importing the package registers its optimizer names."""

from .optim import MarsAdamW, MarsLion, MarsShampoo
from .trainer.arguments import MarsTrainingArguments
from .trainer.callbacks import MarsDiagnosticsCallback
from .trainer.param_groups import param_groups
from .trainer.registry import register
from .trainer.trainer import MarsTrainer

__version__ = "0.1.0"

__all__ = [
    "MarsAdamW",
    "MarsDiagnosticsCallback",
    "MarsLion",
    "MarsShampoo",
    "MarsTrainer",
    "MarsTrainingArguments",
    "param_groups",
    "register",
]
