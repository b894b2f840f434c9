"""Next-token accuracy and perplexity against their definitions."""

import math
import time

import numpy as np
import pytest
import torch

from hf_mars.clm.metrics import (
    IGNORED_LABEL,
    ComputeLanguageModelMetrics,
    NextTokenAccuracy,
    losses_and_tokens,
    perplexity,
)


def make_batch(sequences=6, length=9, vocabulary=3, ignored=0.3, seed=0):
    rng = np.random.default_rng(seed)
    predictions = rng.integers(vocabulary, size=(sequences, length))
    labels = rng.integers(vocabulary, size=(sequences, length))
    labels[rng.random(labels.shape) < ignored] = IGNORED_LABEL
    return predictions, labels


def accuracy_by_definition(predictions, labels):
    right = [
        p[i] == row[i + 1]
        for p, row in zip(predictions, labels, strict=True)
        for i in range(len(row) - 1)
        if row[i + 1] != IGNORED_LABEL
    ]
    return sum(right) / len(right)


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor, np.ndarray.tolist], ids=["numpy", "torch", "lists"])
def test_equals_the_definition(convert):
    predictions, labels = make_batch()
    result = NextTokenAccuracy().compute(predictions=convert(predictions), references=convert(labels))
    assert result == {"accuracy": accuracy_by_definition(predictions, labels)}


def test_batches_of_any_length_add_up_and_compute_starts_afresh():
    metric = NextTokenAccuracy()
    batches = [make_batch(length=length, seed=length) for length in (5, 9, 2)]
    for predictions, labels in batches:
        metric.add_batch(predictions=predictions, references=labels)
    padded = [
        np.concatenate([np.pad(b[which], ((0, 0), (0, 9 - b[which].shape[1])), constant_values=fill) for b in batches])
        for which, fill in ((0, 0), (1, IGNORED_LABEL))
    ]
    assert metric.compute()["accuracy"] == accuracy_by_definition(*padded)
    assert metric.compute(predictions=[[1, 0]], references=[[0, 1]]) == {"accuracy": 1.0}


def test_add_is_a_batch_of_one():
    metric = NextTokenAccuracy()
    metric.add(prediction=[1, 2, 0], reference=[0, 1, 0])
    assert metric.compute() == {"accuracy": 0.5}


def test_nothing_to_count_is_nan():
    assert math.isnan(NextTokenAccuracy().compute(predictions=[[1, 1]], references=[[1, IGNORED_LABEL]])["accuracy"])


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (4,)])
def test_unequal_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="one shape"):
        NextTokenAccuracy().add_batch(predictions=np.zeros(shape), references=np.zeros((2, 2)))


def test_merging_over_files_is_refused():
    with pytest.raises(ValueError, match="num_process must be 1"):
        NextTokenAccuracy(num_process=2, process_id=0)


def test_two_million_tokens_take_no_time_and_no_file(tmp_path):
    predictions, labels = make_batch(2000, 1000, vocabulary=50)
    metric = NextTokenAccuracy(cache_dir=str(tmp_path))
    start = time.perf_counter()
    metric.compute(predictions=predictions, references=labels)
    assert time.perf_counter() - start < 1.0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


class Prediction:
    def __init__(self, predictions, label_ids):
        self.predictions, self.label_ids = predictions, label_ids


@pytest.mark.parametrize("wrap", [lambda logits: logits, lambda logits: (logits, None)], ids=["logits", "tuple"])
def test_compute_metrics_batch_by_batch_and_at_once(wrap):
    """Against torch's mean over all tokens, with sequences of which different numbers of tokens count."""
    logits = torch.randn(6, 9, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor(make_batch()[1])
    expected_loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected_accuracy = accuracy_by_definition(logits.argmax(-1).tolist(), labels.tolist())
    compute = ComputeLanguageModelMetrics()

    def prediction(rows):
        return Prediction(losses_and_tokens(wrap(logits[rows]), labels[rows]), labels[rows])

    assert compute(prediction(slice(4)), compute_result=False) == {}
    for result in (compute(prediction(slice(4, 6))), compute(prediction(slice(6)))):  # by batch, then at once
        assert result["loss"] == pytest.approx(expected_loss.item(), rel=1e-6)
        assert result["perplexity"] == math.exp(result["loss"])
        assert result["accuracy"] == expected_accuracy


@pytest.mark.parametrize("loss, expected", [(0.0, 1.0), (2.0, math.e**2), (1e4, math.inf), (math.inf, math.inf)])
def test_perplexity(loss, expected):
    assert perplexity(loss) == pytest.approx(expected)


def test_perplexity_of_nan_is_nan():
    assert math.isnan(perplexity(math.nan))
