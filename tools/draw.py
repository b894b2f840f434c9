"""Draw the pictures of the docs that come from benchmarks/results alone: `make pictures`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
COMPARISON = ROOT / "benchmarks" / "results" / "comparison.json"
NEUTRAL, OURS = "#9aa5b1", "#1f6feb"


def best_rows(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each row's learning rates the one with the smallest loss, as README's table has them."""
    best: dict[str, dict[str, Any]] = {}
    for row in comparison["rows"]:
        best[row["row"]] = min(best.get(row["row"], row), row, key=lambda r: r["eval_loss"])
    return list(best.values())


def draw_comparison(path: Path) -> None:
    """A bar per optimizer, its perplexity on held-out text; zero is where the bars begin."""
    comparison = json.loads(COMPARISON.read_text(encoding="utf-8"))
    rows = best_rows(comparison)
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['optim']}  β = ({row['betas'][0]:g}, {row['betas'][1]:g})" for row in rows]
    colors = [OURS if row["optim"].startswith("mars") else NEUTRAL for row in rows]
    bars = axes.barh(names, [row["eval_perplexity"] for row in rows], color=colors, height=0.65)
    axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.invert_yaxis()
    axes.spines[["top", "right", "bottom", "left"]].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelbottom=False)
    tokens = comparison["steps"] * comparison["tokens_per_step"]
    figure.suptitle(
        f"Perplexity on held-out text after {tokens:,} tokens: less is better\n"
        f"(a GPT-2 of 1.07M parameters, {comparison['steps']} steps, mean of {len(comparison['seeds'])} seeds, "
        "the better of two learning rates each)",
        fontsize="medium",
        x=0.01,
        ha="left",
    )
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    draw_comparison(ROOT / "docs" / "images" / "comparison.png")
