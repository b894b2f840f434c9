"""MarsTrainer: the Transformers Trainer with exact MARS."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..optim.mars import Mars
from .arguments import MarsTrainingArguments
from .callbacks import MarsDiagnosticsCallback, mars_optimizer
from .checkpoint_saving import checkpoint_to_load, whole_checkpoint
from .clipping import Clipping
from .names import mars_name
from .options import hyperparameters, optimizer_cls_and_kwargs
from .signals import StopOnSignal
from .skipping import tell_skipped

logger = logging.get_logger(__name__)


class _Update(NamedTuple):
    """An update whose previous point is still to be evaluated."""

    optimizer: Mars
    micro_batches: list[dict[str, Any]]
    num_items_in_batch: torch.Tensor | int | None


class MarsTrainer(Trainer):
    """A drop-in `transformers.Trainer` that also trains with `optim_args="exact=true"`.

    With any other setting it gives the same run as the stock Trainer with two exceptions: it takes no step where the
    checkpoint that it resumes has all of them (Trainer takes one more each time); and the step takes the clip by
    `max_grad_norm` along, whose norm is rounded otherwise (`hf_mars.trainer.clipping`; with `args.fuse_clip=False` the
    runs are equal bit for bit).

    In exact mode all micro-batches of an update are first evaluated at x_{t−1}, then at x_t, each time with the same
    random numbers (dropout), loss scaling and clipping by the evaluation's own global norm. Logged loss, gradient norm
    and token counts are those of the evaluation at x_t; total_flos counts both.

    Diagnostics of logged steps are logged with the loss (`MarsDiagnosticsCallback`) unless `args.mars_diagnostics` is
    False.

    Checkpoints are whole or do not count (docs/reliability.md): each gets a manifest of its files, written last.

    A step whose gradient is not finite changes nothing; `args.max_skipped_steps` of them in a row (10), noticed where
    the Trainer logs, saves or ends, are an error (`hf_mars.trainer.skipping`).

    After SIGTERM, SIGINT or SIGUSR1 the update is finished, a checkpoint saved and the process ended with 128 + the
    signal's number, unless the process has a handler of its own for it.

    Where a subclass overrides `training_step` or `compute_loss`, its method is called for both evaluations.

    Args:
        model, args and the rest: as for `Trainer`; `args` defaults to `MarsTrainingArguments("tmp_trainer")`.

    Raises:
        ValueError: `optimizers` brings one that is not in exact mode, but `args` ask for it; or, when training starts,
            in exact mode, accelerate's fp16, whose gradient scaler rescales only one of the two evaluations. Engines
            that MARS does not work with are refused when `args` are made (`hf_mars.trainer.engines.check_engine`).

    Attributes:
        is_finished: after training has begun, whether there was no step left to take.
        clipping: how gradients are clipped, and why before the step in passes of its own, where that is so.
    """

    is_finished = False

    def __init__(
        self, model: nn.Module | None = None, args: TrainingArguments | None = None, *rest: Any, **kwargs: Any
    ):
        if args is None:
            args = MarsTrainingArguments(output_dir="tmp_trainer")
        self._due: _Update | None = None
        self.previous_norm: torch.Tensor | float | None = None  # of the gradients at x_{t−1}
        self.clipping = Clipping()
        self._pushes: list[str] | None = None  # checkpoints to push once they are whole; None: at once
        super().__init__(model, args, *rest, **kwargs)
        self._check_own_optimizer()
        self.add_callback(_UpdateBegins(self))
        self._stop_on_signal = StopOnSignal()
        self.add_callback(self._stop_on_signal)
        if getattr(self.args, "mars_diagnostics", True):
            MarsDiagnosticsCallback().attach(self)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: PreTrainedModel | None = None) -> tuple[Any, Any]:
        """The optimizer's class and its keyword arguments, as `Trainer` has them, with exact mode allowed."""
        if mars_name(args) is None:
            return Trainer.get_optimizer_cls_and_kwargs(args, model)
        return optimizer_cls_and_kwargs(args, model)

    def _check_own_optimizer(self) -> None:
        """Refuse an optimizer of the user's that would silently leave out the exact mode that `args` ask for."""
        if self.optimizer is None or mars_name(self.args) is None or self._exact_optimizer() is not None:
            return
        if hyperparameters(self.args).get("exact"):
            raise ValueError(
                f"optim_args={self.args.optim_args!r} asks for exact mode, but optimizers= brings a "
                f"{type(self.optimizer).__name__} that is not in it; leave out one of the two"
            )
        if self.args.optim_args:
            logger.warning(
                f"optim_args={self.args.optim_args!r} has no effect: optimizers= brings the optimizer, "
                f"{type(self.optimizer).__name__}"
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As `Trainer.create_optimizer`; in exact mode the optimizer starts without a previous point's gradients.

        Raises:
            ValueError: exact mode with fp16.
        """
        optimizer = super().create_optimizer(*args, **kwargs)
        exact = self._exact_optimizer()
        if exact is not None:
            if self.args.fp16 or self.accelerator.scaler is not None:
                raise ValueError("optim_args exact=true does not work with fp16=True; use bf16=True or full precision")
            exact.forget_previous_point()  # of an update that broke off, where training starts again
        return optimizer

    def _exact_optimizer(self) -> Mars | None:
        """The optimizer under accelerate's wrapper, if it is in exact mode."""
        optimizer = mars_optimizer(self.optimizer)
        is_exact = optimizer is not None and any(group["exact"] for group in optimizer.param_groups)
        return optimizer if is_exact else None

    # ---- checkpoints ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`, from whole checkpoints alone.

        Args:
            resume_from_checkpoint: True takes the newest whole one in `output_dir`, with a warning that names those
                that were passed over and why.
            args, kwargs: as for `Trainer.train`.

        Raises:
            CheckpointError: the checkpoint that is named, or with True every one, is not whole.
            TrainingStopped: a SystemExit, after a signal (`hf_mars.trainer.signals`).
        """
        checkpoint = checkpoint_to_load(self.args, resume_from_checkpoint)
        self.clipping.begin()
        with self._stop_on_signal.listening():
            return super().train(checkpoint, *args, **kwargs)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        progress = super()._init_training_state(*args, **kwargs)
        self.is_finished = self.state.global_step >= self.state.max_steps
        if self.is_finished:
            logger.info(f"step {self.state.global_step} of {self.state.max_steps}: there is nothing left to train")
        return progress

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer asks only after a step whether a run is at its end.
        if self.is_finished:
            self.control.should_training_stop = True  # a stream has epochs without end
        else:
            super()._run_epoch(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if not (self.is_finished and "train_loss" in logs):  # the loss of no step would be logged as 0
            super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if mars_name(self.args) is not None:  # before the folder is begun; of a stock Trainer hooks.py does it
            tell_skipped(self.args, self.state, self.optimizer)
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        self._pushes = []
        with whole_checkpoint(self, folder):
            super()._save_checkpoint(model, trial)
        pushes, self._pushes = self._pushes, None
        for pushed in pushes:
            self._push_from_checkpoint(pushed)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._pushes is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:
            self._pushes.append(checkpoint_folder)

    # ---- the clip ----

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = self.clipping.clip(self, model, self.args.max_grad_norm)
        return super()._clip_grad_norm(model) if norm is None else norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # max_grad_norm=0: it is logged, and a step that it is not finite for is skipped
            grad_norm = self.clipping.clip(self, model, math.inf)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    # ---- exact mode ----

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The micro-batches of the coming update, as `Trainer` draws them; notes whether x_{t−1} needs them too."""
        micro_batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        optimizer = self._exact_optimizer()
        self._due = self.previous_norm = None
        if optimizer is not None and optimizer.needs_previous_point:
            self._due = _Update(optimizer, micro_batches, num_items_in_batch)
        return micro_batches, num_items_in_batch

    def _evaluate_previous_point(self) -> None:
        """Evaluate all micro-batches of the update that is due at x_{t−1}, as the loop will evaluate them at x_t."""
        if self._due is None:
            return
        (optimizer, micro_batches, num_items_in_batch), self._due = self._due, None
        model = self.model_wrapped
        gradient_state = self.accelerator.gradient_state
        sync_gradients = gradient_state.sync_gradients
        with optimizer.previous_point():
            for i, inputs in enumerate(micro_batches):
                is_last = i == len(micro_batches) - 1
                gradient_state._set_sync_gradients(is_last)
                with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model=model):
                    self.training_step(model, inputs, num_items_in_batch)
                # transformers declares an int and adds floats itself.
                self.current_flos += float(self.floating_point_ops(inputs))  # type: ignore[assignment]
            norm = self._clip_grad_norm(model) if self.args.max_grad_norm > 0 else None
            self.previous_norm = self._get_grad_norm(model, grad_norm=norm)
        gradient_state._set_sync_gradients(sync_gradients)


class _UpdateBegins(TrainerCallback):
    """Evaluates the previous point where the loop begins an update.

    Not earlier, since a resumed run loads its random state after it has drawn the batches; not later, since the first
    of several micro-batches is already inside of no_sync, where no process would learn of the others' gradients.
    """

    def __init__(self, trainer: MarsTrainer):
        self.trainer = trainer

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._evaluate_previous_point()
