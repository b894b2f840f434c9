"""MarsTrainer: the Transformers Trainer with exact MARS."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from ..optim.mars import Mars
from .arguments import MarsTrainingArguments
from .options import mars_name, optimizer_cls_and_kwargs


class MarsTrainer(Trainer):
    """A drop-in ``transformers.Trainer`` that also trains with ``optim_args="exact=true"``.

    With any other setting it gives the same run as the stock Trainer, bit for bit. In exact mode every micro-batch of
    an update is first evaluated at x_{t−1}, then at x_t, with the same random numbers (dropout), loss scaling and
    gradient clipping; loss, token counts and FLOPs that are logged are those of the evaluation at x_t.

    Args:
        model, args and the rest: as for ``Trainer``; ``args`` defaults to ``MarsTrainingArguments("tmp_trainer")``.

    Raises:
        ValueError: exact mode together with fp16, whose gradient scaler rescales only one of the two evaluations.
    """

    def __init__(self, model: nn.Module | None = None, args: TrainingArguments | None = None, *rest, **kwargs):
        if args is None:
            args = MarsTrainingArguments(output_dir="tmp_trainer")
        # The micro-batches of the coming update while its previous point is still to be evaluated, else None.
        self._batches_due: list[dict[str, Any]] | None = None
        super().__init__(model, args, *rest, **kwargs)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        if mars_name(args) is None:
            return Trainer.get_optimizer_cls_and_kwargs(args, model)
        optimizer_cls, kwargs = optimizer_cls_and_kwargs(args, model)
        if kwargs.get("exact") and args.fp16:
            raise ValueError("optim_args exact=true does not work with fp16=True; use bf16=True or full precision")
        return optimizer_cls, kwargs

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        is_due = isinstance(optimizer, Mars) and optimizer.needs_previous_point
        self._batches_due = batch_samples if is_due else None
        return batch_samples, num_items_in_batch

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        if self._batches_due is not None:
            batches, self._batches_due = self._batches_due, None
            self._evaluate_previous_point(model, batches, num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)

    def _evaluate_previous_point(self, model: nn.Module, batches: list[dict[str, Any]], num_items_in_batch) -> None:
        """All micro-batches of one update at x_{t−1}, as the loop will evaluate them at x_t."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        gradient_state = self.accelerator.gradient_state
        sync_gradients = gradient_state.sync_gradients
        with optimizer.previous_point():
            for i, inputs in enumerate(batches):
                is_last = i == len(batches) - 1
                gradient_state._set_sync_gradients(is_last)
                with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model=model):
                    super().training_step(model, inputs, num_items_in_batch)
            if self.args.max_grad_norm > 0:
                self._clip_grad_norm(model)
        gradient_state._set_sync_gradients(sync_gradients)
