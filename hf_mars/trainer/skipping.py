"""Steps that a Trainer's optimizer skips, as a gradient is not finite: by which norm, and when they are too many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.utils import logging

from ..optim.diagnostics import not_finite
from ..optim.mars import Mars
from .callbacks import after_update, mars_optimizer

logger = logging.get_logger(__name__)

MAX_SKIPPED_STEPS = 10
NAMED = 3  # tensors in a message
_told: WeakKeyDictionary[Mars, int] = WeakKeyDictionary()  # the number of skipped steps that a warning has named


class NotFiniteError(RuntimeError):
    """Training cannot go on: gradients, or a momentum, are not finite. The message is one sentence."""


def tell_norm(trainer: Trainer, norm: Any) -> None:
    """Let the coming step be skipped if the gradients' norm, which the Trainer has measured, is not finite.

    Args:
        trainer: whose optimizer takes the step next.
        norm: as `Trainer._get_grad_norm` returns it. DeepSpeed's is that of the step before, and it skips by itself.
    """
    mars = mars_optimizer(trainer.optimizer)
    if mars is not None and norm is not None:
        previous = getattr(trainer, "previous_norm", None)
        mars.skip_unless_finite(norm, *([] if previous is None else [previous]))


def check_finite(trainer: Trainer, model: nn.Module) -> None:
    """Where the Trainer will log or save after the update under way, or end with it: raise if too many steps in a row
    were skipped.

    Call it before the clip, which makes every gradient NaN where one is.

    Raises:
        NotFiniteError: in all processes: `max_skipped_steps` (10, where the arguments have none) in a row with this
            one; or a momentum that is not finite.
    """
    mars = mars_optimizer(trainer.optimizer)
    if mars is None:
        return
    coming = after_update(trainer.args, trainer.state, trainer.callback_handler.train_dataloader)
    if not (coming.should_log or coming.should_save or coming.should_training_stop):
        return
    names: dict[Tensor, str] = {param: name.removeprefix("module.") for name, param in model.named_parameters()}
    step = trainer.state.global_step + 1
    if bad := not_finite(mars, "exp_avg"):
        raise NotFiniteError(
            f"step {step}: the momentum of {_named(bad, names)} is not finite and would stay "
            "so; go on from an earlier checkpoint, with max_grad_norm > 0 or optim_args skip_nonfinite=true"
        )
    if mars.skipped_in_a_row + 1 >= _limit(trainer.args) and (bad := not_finite(mars, "grad")):
        message = _too_many(step, mars.skipped_in_a_row + 1, trainer.args)
        raise NotFiniteError(f"{message}: here those of {_named(bad, names)}")


def tell_skipped(args: TrainingArguments, state: TrainerState, optimizer: Optimizer | None) -> None:
    """At a save, before anything is written, and at the end of training: say how many steps were skipped, if there
    are more than said before.

    Raises:
        NotFiniteError: in all processes: `max_skipped_steps` in a row, up to the last one.
    """
    mars = mars_optimizer(optimizer)
    if mars is None:
        return
    if mars.skipped_in_a_row >= _limit(args):  # of a save or an end that nobody foresaw
        raise NotFiniteError(_too_many(state.global_step, mars.skipped_in_a_row, args))
    total = mars.skipped_steps
    if total > _told.get(mars, 0) and state.is_world_process_zero:
        logger.warning(
            f"step {state.global_step}: {total} step{'s' if total > 1 else ''} changed nothing so far, since "
            "gradients were not finite"
        )
    _told[mars] = total


def _limit(args: TrainingArguments) -> int:
    return getattr(args, "max_skipped_steps", MAX_SKIPPED_STEPS)


def _too_many(step: int, in_a_row: int, args: TrainingArguments) -> str:
    return (
        f"step {step}: {in_a_row} steps in a row have changed nothing (max_skipped_steps={_limit(args)}), since "
        "gradients are not finite"
    )


def _named(params: Sequence[Tensor], names: dict[Tensor, str]) -> str:
    first = ", ".join(names.get(param, f"a tensor of shape {tuple(param.shape)}") for param in params[:NAMED])
    return f"{first} and {len(params) - NAMED} more tensors" if len(params) > NAMED else first
