"""Metrics of causal language models, computed without the network and without keeping logits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from transformers import EvalPrediction

IGNORED_LABEL = -100

_DESCRIPTION = "The share of tokens that the model's most likely next token predicts, over the labels that count."
_INPUTS = """
Args:
    predictions: token ids of shape (sequences, length), integers. predictions[:, i] was made from the tokens up to and
        including position i, so it is compared with references[:, i + 1].
    references: labels of the same shape; -100 marks a position that does not count.
Returns:
    accuracy: the share of right predictions, between 0 and 1; nan when no label counts.
"""


class NextTokenAccuracy(evaluate.Metric):
    """Next-token accuracy as an `evaluate.Metric` that keeps two integers instead of its inputs.

    `evaluate.Metric` writes every prediction to an Arrow file and reads all of them back to compute; for token ids
    that takes seconds per million. Accuracy is a ratio of counts, so `add_batch` counts and `compute` divides: the
    inputs can be given at once or batch by batch, and `compute` starts afresh afterwards.

    The counts are those of this process. Under `Trainer` that is all there is to do, since it gathers predictions and
    labels from every process first; `num_process > 1` (evaluate's own merging over files) raises ValueError.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.num_process != 1:
            raise ValueError(
                f"num_process must be 1, not {self.num_process}: gather predictions and references before add_batch"
            )
        self._reset()

    def _reset(self) -> None:
        self._correct = 0
        self._total = 0

    def _info(self) -> evaluate.MetricInfo:
        token_ids = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": token_ids, "references": token_ids}),
        )

    def add_batch(self, *, predictions: npt.ArrayLike, references: npt.ArrayLike) -> None:
        """Count a batch: arrays, CPU tensors or nested lists of integers, both of shape (sequences, length).

        Raises:
            ValueError: the shapes differ, or are others.
        """
        predictions, references = np.asarray(predictions), np.asarray(references)
        if predictions.shape != references.shape or predictions.ndim != 2:
            raise ValueError(
                "predictions and references must have one shape (sequences, length), "
                f"not {predictions.shape} and {references.shape}"
            )
        guesses, targets = predictions[:, :-1], references[:, 1:]
        counted = targets != IGNORED_LABEL
        self._correct += int(np.count_nonzero((guesses == targets) & counted))
        self._total += int(np.count_nonzero(counted))

    def add(self, *, prediction: npt.ArrayLike, reference: npt.ArrayLike) -> None:
        """Count one sequence: its predictions and its labels, both of shape (length,)."""
        self.add_batch(predictions=np.asarray(prediction)[None], references=np.asarray(reference)[None])

    def compute(self, *, predictions: Any = None, references: Any = None) -> dict[str, float]:
        """{"accuracy": float} over all that was added, and over the given batch; then forget it all."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        accuracy = self._correct / self._total if self._total else math.nan
        self._reset()
        return {"accuracy": accuracy}


class ComputeLanguageModelMetrics:
    """`Trainer(compute_metrics=…)` for loss, perplexity and next-token accuracy, with or without `batch_eval_metrics`.

    Needs `preprocess_logits_for_metrics=losses_and_tokens`, so that logits never leave their batch. All three are
    means over the tokens that count. On several processes they are those of one: Trainer repeats sequences to fill the
    last batch and counts them in its own loss, but does not gather them for this function. The loss has Trainer's
    name for its own loss, and takes its place.
    """

    def __init__(self) -> None:
        self.metric = NextTokenAccuracy()
        self._reset()

    def _reset(self) -> None:
        self._loss = 0.0
        self._tokens = 0

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Count a batch, or all of them.

        Args:
            prediction: the results of losses_and_tokens, as arrays or tensors, and the labels.

        Returns:
            {"loss": mean cross entropy in nats per token, "perplexity": float, "accuracy": float}, over all calls
            since the last with a result; {} where compute_result is False.
        """
        losses, tokens = map(_to_numpy, prediction.predictions)
        labels = _to_numpy(prediction.label_ids)
        self.metric.add_batch(predictions=tokens, references=labels)
        self._loss += float(losses.sum(dtype=np.float64))
        self._tokens += int(np.count_nonzero(labels[:, 1:] != IGNORED_LABEL))
        if not compute_result:
            return {}
        loss = self._loss / self._tokens if self._tokens else math.nan
        self._reset()
        return {"loss": loss, "perplexity": perplexity(loss), **self.metric.compute()}


def _to_numpy(array: Any) -> npt.NDArray[Any]:
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def losses_and_tokens(
    logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduce the logits of a batch to two tensors that evaluation needs, with a row per sequence.

    Trainer gathers the rows of all processes and leaves out those that it repeated to fill a batch.

    Args:
        logits: shape (sequences, length, vocabulary). Some models return more; these come first in the tuple.
        labels: int64, shape (sequences, length); position i is predicted by the logits before it, -100 does not count.

    Returns:
        The summed cross entropy of each sequence in nats, float32 of shape (sequences,), and the most likely token
        after each position, int64 of shape (sequences, length).
    """
    if isinstance(logits, tuple):
        logits = logits[0]
    losses = [  # one by one: float32 logits of a whole batch would be the largest tensor of the evaluation
        torch.nn.functional.cross_entropy(row[:-1].float(), targets[1:], ignore_index=IGNORED_LABEL, reduction="sum")
        for row, targets in zip(logits, labels, strict=True)
    ]
    return torch.stack(losses), logits.argmax(dim=-1)


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats per token; inf where that exceeds the largest float, nan for nan."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
