"""The comparison, of rows alone: best settings, edges of grids, paired differences, crossings of curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .curves import Point, smoothed
from .plan import Setting

Row = dict[str, Any]
# An evaluation curve with fewer points cannot say where it crosses a loss.
ENOUGH_EVALUATIONS = 4


def setting_of(row: Row) -> Setting:
    return Setting(row["optimizer"], tuple(row["arguments"].items()))


def loss_of(row: Row) -> float:
    """Infinite for a run that failed or whose loss is no number: no setting with such a run is the best."""
    failed = row["status"] == "failed" or row["final_loss"] is None
    return math.inf if failed else float(row["final_loss"])


def losses_by_setting(rows: Iterable[Row]) -> dict[str, dict[Setting, dict[int, float]]]:
    """label -> setting -> seed -> final loss, of the runs that ended."""
    losses: dict[str, dict[Setting, dict[int, float]]] = {}
    for row in rows:
        if row["kind"] == "run":
            losses.setdefault(row["optimizer"], {}).setdefault(setting_of(row), {})[row["seed"]] = loss_of(row)
    return losses


def common_seeds(losses: dict[str, dict[Setting, dict[int, float]]]) -> set[int]:
    """The seeds that every setting of every optimizer was trained with."""
    seeds = [set(by_seed) for settings in losses.values() for by_seed in settings.values()]
    return set.intersection(*seeds) if seeds else set()


def best_settings(losses: dict[str, dict[Setting, dict[int, float]]]) -> dict[str, Setting | None]:
    """Each optimizer's setting with the lowest mean loss over the seeds that all settings have (else over its own).

    None for an optimizer none of whose settings came through with all of these seeds.
    """
    seeds = common_seeds(losses)
    best: dict[str, Setting | None] = {}
    for label, settings in losses.items():
        means = {
            setting: statistics.fmean(by_seed[seed] for seed in seeds or by_seed)
            for setting, by_seed in settings.items()
        }
        setting = min(means, key=lambda s: means[s])
        best[label] = setting if math.isfinite(means[setting]) else None
    return best


def neighbours(best: Setting, settings: Iterable[Setting]) -> list[float]:
    """The learning rates, ascending, of the settings that differ from `best` in nothing else."""
    return sorted({s.learning_rate for s in settings if s.others == best.others})


def edge(best: Setting, settings: Iterable[Setting]) -> str | None:
    """The side of its learning rates, "lower" or "upper", at whose end the best one is. None if it is inside, or
    if there is only one."""
    rates = neighbours(best, settings)
    if len(rates) < 2 or best.learning_rate not in (rates[0], rates[-1]):
        return None
    return "lower" if best.learning_rate == rates[0] else "upper"


def extended(best: Setting, settings: Iterable[Setting], side: str) -> Setting:
    """One learning rate further: by the ratio of the two outermost ones, or 2 where there is only one."""
    rates = neighbours(best, settings)
    outer, inner = (rates[0], rates[:2][-1]) if side == "lower" else (rates[-1], rates[-2:][0])
    ratio = outer / inner if outer != inner else (0.5 if side == "lower" else 2.0)
    return best.at(float(f"{outer * ratio:.4g}"))


@dataclass
class Difference:
    """A paired difference of final losses, optimizer − baseline.

    Attributes:
        mean: over the seeds, in nats.
        error: the standard error of the mean; None with one seed.
        seeds: the number of pairs.
    """

    mean: float
    error: float | None
    seeds: int


def paired(ours: dict[int, float], baseline: dict[int, float]) -> Difference | None:
    """Over the seeds for which both have a finite loss; None if there are none."""
    seeds = sorted(set(ours) & set(baseline))
    differences = [ours[seed] - baseline[seed] for seed in seeds]
    differences = [d for d in differences if math.isfinite(d)]
    if not differences:
        return None
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return Difference(statistics.fmean(differences), error, len(differences))


def mean_curve(rows: Sequence[Row], kind: str) -> list[Point]:
    """The mean over runs of their curves, at the steps that all of them have.

    Args:
        rows: runs of one setting.
        kind: "evaluation", or "training" for the smoothed training losses.
    """
    curves = []
    for row in rows:
        points = [Point(p[0], math.nan if p[1] is None else p[1], p[2], p[3]) for p in row[kind]]
        points = smoothed(points) if kind == "training" else points
        curves.append({point.step: point for point in points})
    if not curves:
        return []
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [
        curves[0][step]._replace(
            loss=statistics.fmean(curve[step].loss for curve in curves),
            seconds=statistics.fmean(curve[step].seconds for curve in curves),
        )
        for step in steps
    ]


def curve_kind(rows: Iterable[Row]) -> str:
    """Which losses all runs have enough of to be compared as curves."""
    return "evaluation" if all(len(row["evaluation"]) >= ENOUGH_EVALUATIONS for row in rows) else "training"


def reaches(curve: Sequence[Point], loss: float) -> float | None:
    """The step at which a curve is first at or below a loss, between its points linearly; None if it never is."""
    before = None
    for point in curve:
        if point.loss <= loss:
            if before is None:
                return float(point.step)
            part = (before.loss - loss) / (before.loss - point.loss)
            return before.step + part * (point.step - before.step)
        before = point if math.isfinite(point.loss) else None
    return None
