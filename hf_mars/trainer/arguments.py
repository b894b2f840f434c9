"""TrainingArguments with MARS's defaults."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

BETA_DEFAULTS = {"adam_beta1": 0.95, "adam_beta2": 0.99}


def transformers_default(name: str):
    """The default of a TrainingArguments field, as transformers declares it."""
    return TrainingArguments.__dataclass_fields__[name].default


@dataclass
class MarsTrainingArguments(TrainingArguments):
    """TrainingArguments whose optimizer is ``mars_adamw``, with MARS's betas (0.95, 0.99) for any MARS optimizer.

    With another ``optim`` the betas are transformers' own, so that a baseline is the usual baseline. Everything else,
    the learning rate too, has transformers' defaults; MARS's other settings go through ``optim_args``.
    """

    optim: str = field(
        default="mars_adamw",
        metadata={"help": "The optimizer: mars_adamw, mars_lion, mars_shampoo, mars_m or any other of transformers'."},
    )
    adam_beta1: float | None = field(
        default=None,
        metadata={"help": "β1, the decay of the first moment. Default: 0.95 for MARS, else transformers' (0.9)."},
    )
    adam_beta2: float | None = field(
        default=None,
        metadata={"help": "β2, the decay of the second moment. Default: 0.99 for MARS, else transformers' (0.999)."},
    )
    mars_diagnostics: bool = field(
        default=True,
        metadata={"help": "Log with the loss what MARS did at that step (with MarsTrainer; docs/diagnostics.md)."},
    )

    def __post_init__(self):
        is_mars = str(getattr(self.optim, "value", self.optim)).startswith("mars_")
        for name, mars_default in BETA_DEFAULTS.items():
            if getattr(self, name) is None:
                setattr(self, name, mars_default if is_mars else transformers_default(name))
        super().__post_init__()
