"""What a Trainer does beside its own work where its optimizer is of MARS: in a run, in a save, at its end.

Each function is put into transformers by `registry`, and imports the rest of this package when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .names import mars_name
from .on_import import wrap_once

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import CallbackHandler


# ---- transformers.trainer_callback ----


def add_to_callbacks(trainer_callback: ModuleType) -> None:
    """Change the class that calls the callbacks of every Trainer."""
    wrap_once(trainer_callback.CallbackHandler, "on_optimizer_step", _with_summary)
    wrap_once(trainer_callback.CallbackHandler, "on_train_end", _with_skipped_steps)


def _with_summary(on_optimizer_step: Callable[..., Any]) -> Callable[..., Any]:
    """The line that says what is in effect."""

    def on_optimizer_step_with_summary(
        self: CallbackHandler, args: TrainingArguments, *rest: Any, **kwargs: Any
    ) -> Any:
        from .summary import show_once

        show_once(args, self.optimizer)
        return on_optimizer_step(self, args, *rest, **kwargs)

    return on_optimizer_step_with_summary


def _with_skipped_steps(on_train_end: Callable[..., Any]) -> Callable[..., Any]:
    """A run that has skipped steps does not end in silence."""

    def on_train_end_with_skipped_steps(
        self: CallbackHandler, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> Any:
        if mars_name(args) is not None:
            from .skipping import tell_skipped

            tell_skipped(args, state, self.optimizer)
        return on_train_end(self, args, state, control, **kwargs)

    return on_train_end_with_skipped_steps


# ---- transformers.trainer ----


def add_to_trainer(trainer: ModuleType) -> None:
    """Change how every Trainer saves, resumes, and clips."""
    wrap_once(trainer, "rotate_checkpoints", _after_saving)
    wrap_once(trainer.Trainer, "_save_checkpoint", _not_of_skipped_steps)
    wrap_once(trainer.Trainer, "create_optimizer", _remembered)
    wrap_once(trainer.Trainer, "_load_optimizer_and_scheduler", _with_settings_given)
    wrap_once(trainer.Trainer, "_clip_grad_norm", _checked)
    wrap_once(trainer.Trainer, "_get_grad_norm", _told)


def _after_saving(rotate: Callable[..., None]) -> Callable[..., None]:
    """Delete no old checkpoint as long as one is being saved: MarsTrainer deletes when it is whole."""

    def rotate_after_saving(output_dir: str, *args: Any, **kwargs: Any) -> None:
        from .checkpoint_saving import being_saved

        if Path(output_dir) not in being_saved:
            rotate(output_dir, *args, **kwargs)

    return rotate_after_saving


def _not_of_skipped_steps(save: Callable[..., None]) -> Callable[..., None]:
    """Save no checkpoint of a run that does nothing any more."""

    def tell_and_save(self: Trainer, *args: Any, **kwargs: Any) -> None:
        if mars_name(self.args) is not None:
            from .skipping import tell_skipped

            tell_skipped(self.args, self.state, self.optimizer)
        save(self, *args, **kwargs)

    return tell_and_save


def _remembered(create: Callable[..., Any]) -> Callable[..., Any]:
    """Note how a MARS optimizer was made from its name, but for one that the user has made."""

    def create_and_remember(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        is_new = self.optimizer is None
        optimizer = create(self, *args, **kwargs)
        if is_new and mars_name(self.args) is not None:
            from .resuming import remember

            remember(optimizer, self.args)
        return optimizer

    return create_and_remember


def _with_settings_given(load: Callable[..., None]) -> Callable[..., None]:
    """Settings that the arguments give take effect after a checkpoint is loaded."""

    def load_then_apply(self: Trainer, checkpoint: str | None) -> None:
        if checkpoint is None:
            load(self, checkpoint)
            return
        from .checkpoint_saving import check_run
        from .resuming import apply_given, check_optimizer

        check_run(Path(checkpoint), self.args)
        check_optimizer(self, Path(checkpoint))
        if mars_name(self.args) is None:
            load(self, checkpoint)
            return
        from .checkpoints import ResumeError

        try:
            load(self, checkpoint)
            apply_given(self)
        except ValueError as error:
            raise ResumeError(f"{checkpoint}: {error}") from error

    return load_then_apply


def _checked(clip: Callable[..., Any]) -> Callable[..., Any]:
    """Look at the gradients of some steps before they are clipped."""

    def check_and_clip(self: Trainer, model: nn.Module) -> Any:
        if mars_name(self.args) is not None:
            from .skipping import check_finite

            check_finite(self, model)
        return clip(self, model)

    return check_and_clip


def _told(get_norm: Callable[..., Any]) -> Callable[..., Any]:
    """Tell the optimizer the norm of its gradients, by which it skips a step with one that is not finite."""

    def get_norm_and_tell(self: Trainer, model: nn.Module, grad_norm: Any = None) -> Any:
        if mars_name(self.args) is None or self.is_deepspeed_enabled:
            return get_norm(self, model, grad_norm=grad_norm)  # DeepSpeed has taken its step by now
        from .skipping import check_finite, tell_norm

        if grad_norm is None:  # it was not clipped
            check_finite(self, model)
        norm = get_norm(self, model, grad_norm=grad_norm)
        tell_norm(self, norm)
        return norm

    return get_norm_and_tell
