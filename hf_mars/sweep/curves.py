"""A run's log, read: its loss curves, its final loss, whether it diverged."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

SMOOTHING = 0.1  # of all steps: the training losses that one smoothed loss is the mean of


class Point(NamedTuple):
    """One logged loss: in nats, after `step` updates, `seconds` of training and (where counted) `tokens`."""

    step: int
    loss: float
    seconds: float
    tokens: float | None = None


def read_log(path: Path) -> dict[str, Any]:
    """What `hf_mars.trainer.run_log` wrote of the last training in a file; {} before it began.

    Returns:
        "begin": what is known when a training begins; "training", "evaluation": lists of `Point`; "state_bytes";
        "end": the number of updates, absent in a training that has not ended.
    """
    log: dict[str, Any] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # a killed run's last line
            continue
        if "begin" in row:
            log, evaluations = {"begin": row["begin"], "training": []}, {}
        elif not log:  # evaluated before training
            continue
        elif "loss" in row:
            log["training"].append(Point(row["step"], row["loss"], row["seconds"], row.get("tokens")))
        elif "step" in row:
            evaluations.setdefault(row["step"], {}).update(row)
        else:
            log.update(row)
    if log:
        log["evaluation"] = [_evaluation(row) for _, row in sorted(evaluations.items())]
    return log


def _evaluation(row: dict[str, Any]) -> Point:
    """Of several evaluation sets the mean."""
    losses = [value for key, value in row.items() if key.startswith("eval_")]
    loss = row["eval_loss"] if "eval_loss" in row else sum(losses) / len(losses)
    return Point(row["step"], loss, row["seconds"], row.get("tokens"))


def smoothed(training: list[Point]) -> list[Point]:
    """Replace each loss by the mean over the last tenth of all steps up to it; the first tenth is left out."""
    if not training:
        return []
    window = SMOOTHING * training[-1].step
    points = []
    for i, point in enumerate(training):
        losses = [p.loss for p in training[: i + 1] if p.step > point.step - window + 1e-9]
        if point.step >= window:
            points.append(point._replace(loss=sum(losses) / len(losses)))
    return points


def final_loss(log: dict[str, Any]) -> tuple[float, str] | None:
    """The last evaluation's loss, or without evaluations the mean of the last tenth of the training losses.

    Returns:
        The loss and which of the two it is, "evaluation" or "training"; None where neither was logged.
    """
    if log.get("evaluation"):
        return log["evaluation"][-1].loss, "evaluation"
    if log.get("training"):
        return smoothed(log["training"])[-1].loss, "training"
    return None


def diverged(log: dict[str, Any]) -> bool:
    """Whether the losses at the end are no numbers, or the smoothed training loss is above the first one logged."""
    final, training = final_loss(log), log["training"]
    if final is None or not math.isfinite(final[0]):
        return True
    return bool(training) and not smoothed(training)[-1].loss <= training[0].loss  # NaN is not


def seconds_per_step(training: list[Point]) -> float | None:
    """The median over a run's log without its first third, where caches fill and kernels are compiled."""
    points = training[len(training) // 3 :]
    steps = itertools.pairwise(points)
    times = sorted((b.seconds - a.seconds) / (b.step - a.step) for a, b in steps if b.step > a.step)
    return times[len(times) // 2] if times else None
