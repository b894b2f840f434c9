"""Default values, read where they are declared: in transformers' arguments, and in the optimizers' constructors."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import TrainingArguments

from ..optim import MarsAdamW


def transformers_default(field: str) -> Any:
    """The default of a field of `TrainingArguments`."""
    return TrainingArguments.__dataclass_fields__[field].default


def mars_default(setting: str) -> Any:
    """The default of a setting that all MARS optimizers share."""
    return inspect.signature(MarsAdamW).parameters[setting].default
