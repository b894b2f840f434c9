"""TrainingArguments with MARS's defaults."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .defaults import mars_default, transformers_default
from .names import DEFAULT, mars_name

MARS_BETAS = dict(zip(("adam_beta1", "adam_beta2"), mars_default("betas"), strict=True))


@dataclass
class MarsTrainingArguments(TrainingArguments):
    """TrainingArguments whose optimizer is `mars_adamw`, with MARS's betas (0.9, 0.99) for any MARS optimizer.

    With another `optim` the betas are transformers' own, so that a baseline is the usual baseline. Everything else,
    the learning rate too, has transformers' defaults; MARS's other settings go through `optim_args`.
    """

    optim: str = field(
        default=DEFAULT,
        metadata={"help": "The optimizer: mars_adamw, mars_lion, mars_shampoo, mars_m or any other of transformers'."},
    )
    # None until __post_init__ knows the optimizer.
    adam_beta1: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "β1, the decay of the first moment. Default: 0.9."},
    )
    adam_beta2: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "β2, the decay of the second moment. Default: 0.99 for MARS, else transformers' (0.999)."},
    )
    mars_diagnostics: bool = field(
        default=True,
        metadata={"help": "Log with the loss what MARS did at that step (with MarsTrainer; docs/diagnostics.md)."},
    )
    fuse_clip: bool = field(
        default=True,
        metadata={
            "help": "Clip by max_grad_norm in the pass of the optimizer's step (MarsTrainer; docs/performance.md). "
            "False: by torch.nn.utils.clip_grad_norm_, which gives the stock Trainer's run bit for bit."
        },
    )
    max_skipped_steps: int = field(
        default=10,
        metadata={
            "help": "Stop where the Trainer logs after so many steps in a row that changed nothing, since their "
            "gradients were not finite (docs/reliability.md)."
        },
    )
    checkpoint_checksums: str = field(
        default="small",
        metadata={
            "help": "Which files of a checkpoint its manifest has checksums of: small (those below 64 MiB) or full "
            "(all of them, read once more at each save and resume; docs/reliability.md).",
            "choices": ["small", "full"],
        },
    )

    def __post_init__(self) -> None:
        if self.checkpoint_checksums not in ("small", "full"):
            raise ValueError(f"checkpoint_checksums must be 'small' or 'full', got {self.checkpoint_checksums!r}")
        if not self.max_skipped_steps >= 1:
            raise ValueError(f"max_skipped_steps must be at least 1, got {self.max_skipped_steps!r}")
        self.given_fields: tuple[str, ...] = ()  # written on a command line that somebody has parsed
        # Which betas were given: a resumed run takes those, and keeps the others as they were saved.
        self.given_betas = tuple(name for name in MARS_BETAS if getattr(self, name) is not None)
        for name, mars_beta in MARS_BETAS.items():
            if getattr(self, name) is None:
                setattr(self, name, transformers_default(name) if mars_name(self) is None else mars_beta)
        super().__post_init__()
