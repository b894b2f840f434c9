"""Diagnostics of a MARS run, in the Trainer's usual logs."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..optim.diagnostics import step_diagnostics
from ..optim.mars import Mars
from .names import mars_name

if TYPE_CHECKING:  # this module is imported at the end of transformers.trainer's own import (registry.py)
    from transformers import Trainer

logger = logging.get_logger(__name__)


def mars_optimizer(optimizer: Optimizer | None) -> Mars | None:
    """The MARS optimizer that `optimizer` is, or that accelerate has wrapped in it; else None."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return optimizer if isinstance(optimizer, Mars) else None


class MarsDiagnosticsCallback(TrainerCallback):
    """Adds to the logged loss a description of that step: the values of `hf_mars.optim.diagnostics.step_diagnostics`,
    each under its name with "mars/" before it, and "mars/skipped_steps", how many steps this process has skipped
    (`Mars.skipped_steps`).

    Steps that are not logged measure nothing. The values go wherever the loss goes: `log_history`,
    `trainer_state.json` and the reporters (TensorBoard, Trackio, W&B). Callbacks are called in the order of the
    Trainer's list, and reporters are callbacks, so this one must come before them: `MarsTrainer` has it there;
    `MarsDiagnosticsCallback().attach(trainer)` puts it there in any other Trainer. In `Trainer(callbacks=[…])` it
    comes after them, and only `log_history` and `trainer_state.json` get the values.

    With an optimizer that is not MARS's, and under DeepSpeed, it does nothing.
    """

    def __init__(self) -> None:
        self._hook: RemovableHandle | None = None
        self._diagnostics: dict[str, float] = {}

    def attach(self, trainer: Trainer) -> None:
        """Put this callback before the reporters of `trainer`, unless that already has one of this class."""
        callbacks = trainer.callback_handler.callbacks
        if not any(isinstance(callback, MarsDiagnosticsCallback) for callback in callbacks):
            callbacks.insert(0, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.deepspeed_plugin is not None and mars_name(args) and state.is_world_process_zero:
            logger.info("mars/… are not logged under DeepSpeed, which takes the steps group by group")
        self._remove_hook()  # of a run that broke off in its step
        self._diagnostics = {}

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        mars = mars_optimizer(optimizer)
        if mars is not None and after_update(args, state, kwargs.get("train_dataloader")).should_log:
            # Measured only in step(): a gradient scaler (fp16) may unscale the gradients as late as on its way there.
            self._hook = mars.register_step_pre_hook(self._measure)

    def _measure(self, optimizer: Mars, args: tuple, kwargs: dict) -> None:
        self._diagnostics = {f"mars/{name}": value for name, value in step_diagnostics(optimizer).items()}

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._remove_hook()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._diagnostics = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._diagnostics and logs is not None and "loss" in logs:
            mars = mars_optimizer(kwargs.get("optimizer"))
            if mars is not None:  # by now the step under way counts
                self._diagnostics["mars/skipped_steps"] = mars.skipped_steps
            logs.update(self._diagnostics)
            if state.log_history and "loss" in state.log_history[-1]:  # which holds a copy of logs by now
                state.log_history[-1].update(self._diagnostics)
            self._diagnostics = {}


def after_update(args: TrainingArguments, state: TrainerState, train_dataloader: Any) -> TrainerControl:
    """What the Trainer will do at the end of the update under way: its own rules, asked one step ahead."""
    ahead = copy.copy(state)
    ahead.global_step += 1
    control = DefaultFlowCallback().on_step_end(args, ahead, TrainerControl())
    if _ends_epoch(state, train_dataloader, args.gradient_accumulation_steps):
        control = DefaultFlowCallback().on_epoch_end(args, ahead, control)
    return control


def _ends_epoch(state: TrainerState, train_dataloader: Any, gradient_accumulation_steps: int) -> bool:
    """Whether the update under way is the last of its epoch."""
    step = state.global_step + 1
    if step == state.max_steps or not has_length(train_dataloader):  # nobody knows where a stream ends
        return step == state.max_steps
    return step % math.ceil(len(train_dataloader) / gradient_accumulation_steps) == 0
