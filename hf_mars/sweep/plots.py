"""A sweep's pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .compare import Row, losses_by_setting
from .summary import Comparison, Summary


def draw(folder: Path, rows: list[Row], comparison: Comparison) -> list[tuple[str, str]]:
    """Draw what there is to draw into the folder.

    Returns:
        (title, file name) of each picture; none where matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return []
    unit = "tokens" if comparison.tokens_counted else "step"
    drawn = []
    figure, axes = _figure(unit, f"{comparison.curve_kind} loss (nats)")
    for i, s in enumerate(comparison.summaries):
        if s.curve:
            xs = [p.tokens if comparison.tokens_counted else p.step for p in s.curve]
            axes.plot(xs, [p.loss for p in s.curve], color=f"C{i}", linewidth=1.2, label=_label(s))
    drawn += _save(figure, axes, comparison, folder, f"Loss against {unit}", "loss.png")
    if all(s.seconds_per_step is not None for s in comparison.summaries if s.curve):
        figure, axes = _figure("seconds of training, timed one run at a time", f"{comparison.curve_kind} loss (nats)")
        for i, s in enumerate(comparison.summaries):
            if s.curve:
                xs = [p.step * (s.seconds_per_step or math.nan) for p in s.curve]
                axes.plot(xs, [p.loss for p in s.curve], color=f"C{i}", linewidth=1.2, label=_label(s))
        drawn += _save(figure, axes, comparison, folder, "Loss against seconds", "seconds.png")
    figure, axes = _figure("learning rate", "final loss (nats)")
    axes.set_xscale("log")
    for i, s in enumerate(comparison.summaries):
        _rates(axes, rows, s.label, s.best.others if s.best else None, f"C{i}")
    _lost(axes, rows, [s.label for s in comparison.summaries])
    drawn += _save(figure, axes, None, folder, "Final loss against learning rate", "learning_rate.png")
    return drawn


def _rates(axes: Any, rows: list[Row], label: str, others: Any, color: str) -> None:
    """Each run as a dot; the settings that differ from the best in the rate alone as a line through their means."""
    points = []
    for setting, losses in losses_by_setting(rows).get(label, {}).items():
        finite = [loss for loss in losses.values() if math.isfinite(loss)]
        axes.plot([setting.learning_rate] * len(finite), finite, ".", color=color, markersize=4, alpha=0.5)
        if setting.others == others and len(finite) == len(losses):
            points.append((setting.learning_rate, sum(finite) / len(finite)))
    if points:
        axes.plot(
            *zip(*sorted(points), strict=True), color=color, linewidth=1.2, marker="o", markersize=4, label=label
        )


def _lost(axes: Any, rows: list[Row], labels: list[str]) -> None:
    """A cross at the upper edge for each run without a final loss."""
    for i, label in enumerate(labels):
        rates = [
            setting.learning_rate
            for setting, losses in losses_by_setting(rows).get(label, {}).items()
            for loss in losses.values()
            if not math.isfinite(loss)
        ]
        if rates:
            heights = [0.98 - 0.03 * i] * len(rates)
            axes.plot(
                rates, heights, "x", color=f"C{i}", transform=axes.get_xaxis_transform(), label=f"{label}: no loss"
            )


def _label(s: Summary) -> str:
    return s.label if s.best is None else f"{s.label}, {s.best.learning_rate:g}"


def _figure(xlabel: str, ylabel: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(
    figure: Any, axes: Any, comparison: Comparison | None, folder: Path, title: str, name: str
) -> list[tuple[str, str]]:
    if not axes.lines:
        return []
    if comparison is not None and comparison.baseline.curve:
        end = f"where {comparison.baseline.label} ends"
        axes.axhline(comparison.baseline.curve[-1].loss, color="C0", linewidth=0.8, linestyle=":", label=end)
    axes.set_title(title, fontsize="medium")
    axes.legend(fontsize="small")
    figure.savefig(folder / name, dpi=120)
    return [(title, name)]
