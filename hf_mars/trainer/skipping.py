"""Steps that a Trainer's optimizer skips, as a gradient is not finite: by which norm, and when they are too many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from ..optim.diagnostics import not_finite
from .callbacks import mars_optimizer, will_log

MAX_SKIPPED_STEPS = 10
NAMED = 3  # tensors in a message


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
    """Where the Trainer will log the update under way: raise if too many steps in a row were skipped.

    Call it before the clip, which makes every gradient NaN where one is.

    Raises:
        NotFiniteError: in all processes: `max_skipped_steps` (10, where the arguments have none) in a row with this
            one; or a momentum that is not finite.
    """
    mars = mars_optimizer(trainer.optimizer)
    if mars is None or not will_log(trainer.args, trainer.state, trainer.callback_handler.train_dataloader):
        return
    names: dict[Tensor, str] = {param: name.removeprefix("module.") for name, param in model.named_parameters()}
    if bad := not_finite(mars, "exp_avg"):
        raise NotFiniteError(
            f"step {trainer.state.global_step + 1}: the momentum of {_named(bad, names)} is not finite and would stay "
            "so; go on from an earlier checkpoint, with max_grad_norm > 0 or optim_args skip_nonfinite=true"
        )
    limit = getattr(trainer.args, "max_skipped_steps", MAX_SKIPPED_STEPS)
    if mars.skipped_in_a_row + 1 >= limit and (bad := not_finite(mars, "grad")):
        raise NotFiniteError(
            f"step {trainer.state.global_step + 1}: {mars.skipped_in_a_row + 1} steps in a row have changed nothing "
            f"(max_skipped_steps={limit}), since gradients are not finite: here those of {_named(bad, names)}"
        )


def _named(params: Sequence[Tensor], names: dict[Tensor, str]) -> str:
    first = ", ".join(names.get(param, f"a tensor of shape {tuple(param.shape)}") for param in params[:NAMED])
    return f"{first} and {len(params) - NAMED} more tensors" if len(params) > NAMED else first
