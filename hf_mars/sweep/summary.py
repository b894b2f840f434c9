"""One optimizer beside the baseline: the numbers of a table's row, and a verdict."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from .compare import (
    Difference,
    Row,
    best_settings,
    curve_kind,
    edge,
    losses_by_setting,
    mean_curve,
    paired,
    reaches,
    setting_of,
)
from .curves import Point
from .plan import Setting


@dataclass
class Summary:
    """What the rows say of one optimizer; None is for what they do not say.

    Attributes:
        label: its name.
        best: its best setting.
        edge: "lower" or "upper" if the best learning rate is the outermost one that was tried.
        losses: seed -> final loss at the best setting.
        difference: from the baseline, paired by seed; None for the baseline itself.
        curve: the mean curve of the best setting, over the seeds that this optimizer and the baseline share.
        part_of_steps: where the curve reaches the baseline's last loss, relative to the baseline's steps.
        is_bound: whether that is the curve's first point, so that it may have been reached before.
        part_of_seconds: the same in seconds of training.
        seconds_per_step: of the timing runs alone on the machine, else of sweeps with one job.
        state_bytes: of the optimizer, in the process that logs.
        parameters: trained ones.
        settings: how many were tried.
        complete, diverged, failed: numbers of runs.
    """

    label: str
    best: Setting | None
    edge: str | None
    losses: dict[int, float]
    difference: Difference | None
    curve: list[Point]
    part_of_steps: float | None
    is_bound: bool
    part_of_seconds: float | None
    seconds_per_step: float | None
    state_bytes: int | None
    parameters: int | None
    settings: int
    complete: int
    diverged: int
    failed: int


@dataclass
class Comparison:
    """All of them, the baseline first; and which losses the curves are of ("evaluation" or "training")."""

    summaries: list[Summary]
    curve_kind: str
    tokens_counted: bool

    @property
    def baseline(self) -> Summary:
        return self.summaries[0]


def compare(rows: list[Row], labels: list[str]) -> Comparison:
    """Everything the report tells.

    Args:
        rows: of results.jsonl.
        labels: the optimizers, the baseline first; those that no row is of have empty summaries.
    """
    losses = losses_by_setting(rows)
    best = best_settings(losses)
    runs_of_best = {
        label: [
            row
            for row in rows
            if row["kind"] == "run" and row["status"] != "failed" and setting_of(row) == best.get(label)
        ]
        for label in labels
    }
    kind = curve_kind(row for runs in runs_of_best.values() for row in runs)
    base_runs = runs_of_best[labels[0]]
    base_losses = losses[labels[0]][base] if (base := best.get(labels[0])) else {}
    base_curve = mean_curve(base_runs, kind)
    base_seconds = _seconds_per_step(rows, base)
    summaries = []
    for label in labels:
        setting = best.get(label)
        own = losses.get(label, {})
        runs = runs_of_best[label]
        shared = [row for row in runs if row["seed"] in base_losses] or runs
        curve = mean_curve(shared, kind)
        seconds = _seconds_per_step(rows, setting)
        difference = paired(own[setting], base_losses) if setting and label != labels[0] else None
        part = part_seconds = None
        if label != labels[0] and base_curve and curve:
            step = reaches(curve, base_curve[-1].loss)
            # Training losses are noisy: none is taken for reached where the final loss is above the baseline's.
            is_above = difference is not None and difference.mean > 0
            part = None if step is None or (is_above and kind == "training") else step / base_curve[-1].step
            if part is not None and seconds is not None and base_seconds is not None:
                part_seconds = part * seconds / base_seconds
        states = [row["state_bytes"] for row in runs if row["state_bytes"] is not None]
        statuses = [row["status"] for row in rows if row["kind"] == "run" and row["optimizer"] == label]
        summaries.append(
            Summary(
                label=label,
                best=setting,
                edge=edge(setting, own) if setting else None,
                losses=own[setting] if setting else {},
                difference=difference,
                curve=curve,
                part_of_steps=part,
                is_bound=part is not None and curve[0].loss <= base_curve[-1].loss,
                part_of_seconds=part_seconds,
                seconds_per_step=seconds,
                state_bytes=states[0] if states else None,
                parameters=runs[0]["parameters"] if runs else None,
                settings=len(own),
                complete=statuses.count("complete"),
                diverged=statuses.count("diverged"),
                failed=statuses.count("failed"),
            )
        )
    tokens = all(point.tokens for summary in summaries for point in summary.curve)
    return Comparison(summaries, kind, tokens and bool(base_runs))


def _seconds_per_step(rows: list[Row], setting: Setting | None) -> float | None:
    """The mean of the timing runs' medians; without them, of runs that had the machine to themselves."""
    own = [row for row in rows if row["seconds_per_step"] is not None and setting_of(row) == setting]
    alone = [row for row in own if row["kind"] == "timing" and row["status"] != "failed"]
    alone = alone or [row for row in own if row["kind"] == "run" and row["jobs"] == 1]
    return statistics.fmean(row["seconds_per_step"] for row in alone) if alone else None


def verdict(summary: Summary, comparison: Comparison) -> str:
    """One sentence."""
    base = comparison.baseline
    label = summary.label
    if summary.best is None:
        if summary.complete + summary.diverged + summary.failed == 0:
            return f"{label} has not run yet."
        text = f"{label} has no setting that came through with every seed"
        return f"{text} ({summary.diverged} runs diverged, {summary.failed} failed)."
    at = f"at {summary.best.describe()}"
    if summary is base:
        return f"{label} is the baseline: {mean(summary.losses):.4f} {at}{_at_edge(summary)}."
    if base.best is None or summary.difference is None:
        return f"{label} ends at {mean(summary.losses):.4f} {at}, and the baseline has nothing to compare it with."
    d = summary.difference
    error = "one seed, no error known" if d.error is None else f"± {d.error:.4f} over {d.seeds} seeds"
    size = f"{abs(d.mean):.4f} ({error})"
    level = d.error is not None and abs(d.mean) <= 2 * d.error
    if level:
        ending = f"ends level with {base.label}: {d.mean:+.4f} ± {d.error:.4f} over {d.seeds} seeds, within two errors"
    elif d.mean == 0:
        ending = f"ends where {base.label} does ({error})"
    else:
        ending = f"ends {size} {'below' if d.mean < 0 else 'above'} {base.label}"
    if summary.part_of_steps is None:
        return f"{label} does not reach {base.label}'s best loss; it {ending}{_at_edge(summary)}."
    unit = "tokens" if comparison.tokens_counted else "steps"
    time = ""
    if summary.part_of_seconds is not None:
        time = f" and {summary.part_of_seconds:.0%} of the time".replace("%", " %")
    part = f"{summary.part_of_steps:.0%}".replace("%", " %")
    after = f"{'at most ' * summary.is_bound}{part} of the {unit}{time}"
    return f"{label} reaches {base.label}'s best loss after {after}; it {ending}{_at_edge(summary)}."


def _at_edge(summary: Summary) -> str:
    if summary.edge is None:
        return ""
    end = "lowest" if summary.edge == "lower" else "highest"
    return f"; its best learning rate is the {end} that was tried, so it may do better"


def mean(losses: dict[int, float]) -> float:
    finite = [loss for loss in losses.values() if math.isfinite(loss)]
    return statistics.fmean(finite) if finite else math.nan


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The table as data, for pages that are made of it."""
    return {
        "curves": comparison.curve_kind,
        "optimizers": [
            {
                "optimizer": s.label,
                "best": dict(s.best.arguments) if s.best else None,
                "edge": s.edge,
                "losses": {str(seed): loss if math.isfinite(loss) else None for seed, loss in s.losses.items()},
                "difference": vars(s.difference) if s.difference else None,
                "part_of_steps": s.part_of_steps,
                "is_bound": s.is_bound,
                "part_of_seconds": s.part_of_seconds,
                "seconds_per_step": s.seconds_per_step,
                "state_bytes": s.state_bytes,
                "parameters": s.parameters,
                "settings": s.settings,
                "complete": s.complete,
                "diverged": s.diverged,
                "failed": s.failed,
                "verdict": verdict(s, comparison),
            }
            for s in comparison.summaries
        ],
    }
