"""MarsTrainer: the Transformers Trainer with exact MARS."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..optim.mars import Mars
from .arguments import MarsTrainingArguments
from .callbacks import MarsDiagnosticsCallback, mars_optimizer
from .options import optimizer_cls_and_kwargs
from .registry import mars_name


class MarsTrainer(Trainer):
    """A drop-in ``transformers.Trainer`` that also trains with ``optim_args="exact=true"``.

    With any other setting it gives the same run as the stock Trainer, bit for bit. In exact mode all micro-batches of
    an update are first evaluated at x_{t−1}, then at x_t, each time with the same random numbers (dropout), loss
    scaling and clipping by the evaluation's own global norm. Logged loss, gradient norm and token counts are those of
    the evaluation at x_t; total_flos counts both.

    What MARS does at logged steps is logged with the loss (:class:`MarsDiagnosticsCallback`) unless
    ``args.mars_diagnostics`` is False.

    Subclasses that override ``training_step`` or ``compute_loss`` are called for both evaluations.

    Args:
        model, args and the rest: as for ``Trainer``; ``args`` defaults to ``MarsTrainingArguments("tmp_trainer")``.

    Raises:
        ValueError: when training starts, in exact mode: fp16, whose gradient scaler rescales only one of the two
            evaluations. Engines that MARS does not work with are refused when ``args`` are made
            (:func:`hf_mars.trainer.engines.check_engine`).
    """

    def __init__(self, model: nn.Module | None = None, args: TrainingArguments | None = None, *rest, **kwargs):
        if args is None:
            args = MarsTrainingArguments(output_dir="tmp_trainer")
        # What the coming update is made of, while its previous point is still to be evaluated: micro-batches and
        # num_items_in_batch. Else None.
        self._due: tuple[list[dict[str, Any]], Any] | None = None
        super().__init__(model, args, *rest, **kwargs)
        self.add_callback(_UpdateBegins(self))
        if getattr(self.args, "mars_diagnostics", True):
            MarsDiagnosticsCallback().attach(self)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        if mars_name(args) is None:
            return Trainer.get_optimizer_cls_and_kwargs(args, model)
        return optimizer_cls_and_kwargs(args, model)

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
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

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        optimizer = self._exact_optimizer()
        is_due = optimizer is not None and optimizer.needs_previous_point
        self._due = (batch_samples, num_items_in_batch) if is_due else None
        return batch_samples, num_items_in_batch

    def _evaluate_previous_point(self) -> None:
        """All micro-batches of one update at x_{t−1}, as the loop will evaluate them at x_t."""
        if self._due is None:
            return
        (batches, num_items_in_batch), self._due = self._due, None
        model = self.model_wrapped
        gradient_state = self.accelerator.gradient_state
        sync_gradients = gradient_state.sync_gradients
        with self._exact_optimizer().previous_point():
            for i, inputs in enumerate(batches):
                is_last = i == len(batches) - 1
                gradient_state._set_sync_gradients(is_last)
                with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model=model):
                    self.training_step(model, inputs, num_items_in_batch)
                self.current_flos += float(self.floating_point_ops(inputs))
            if self.args.max_grad_norm > 0:
                self._clip_grad_norm(model)
        gradient_state._set_sync_gradients(sync_gradients)


class _UpdateBegins(TrainerCallback):
    """Evaluates the previous point where the loop begins an update.

    Not earlier, since a resumed run loads its random state after it has drawn the batches; not later, since the first
    of several micro-batches is already inside of no_sync, where no process would learn of the others' gradients.
    """

    def __init__(self, trainer: MarsTrainer):
        self.trainer = trainer

    def on_step_begin(self, *args, **kwargs) -> None:
        self.trainer._evaluate_previous_point()
