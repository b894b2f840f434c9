"""Draw the pictures of the docs that come from benchmarks/results alone, and fill in their tables: `make pictures`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import tables
from matplotlib.figure import Figure

from hf_mars.sweep.compare import losses_by_setting

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
CORPORA = {"pretrain_prose": "prose", "pretrain_docs": "documentation"}
# Of the first picture: an optimizer's name in the results, its name in the picture, its colour.
BARS = {
    "adamw (0.9, 0.95)": ("AdamW, tuned", "#9aa5b1"),
    tables.ADAMW: ("mars_adamw", "#1f6feb"),
    tables.MARS_M: ("mars_m", "#0b3d91"),
}


def draw_tokens(path: Path) -> None:
    """For each corpus a bar per optimizer: how many tokens it needs to tuned AdamW's last loss."""
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    for axes, (name, corpus) in zip(figure.subplots(1, len(CORPORA), sharey=True), CORPORA.items(), strict=True):
        _, comparison = tables.read(name)
        found = {s.label: s for s in comparison.summaries}
        parts = [100.0 * (1 if s is comparison.baseline else s.part_of_steps) for s in (found[x] for x in BARS)]
        names, colors = zip(*BARS.values(), strict=True)
        bars = axes.barh(names, parts, color=colors, height=0.6)
        axes.bar_label(bars, fmt="%.0f %%", padding=4)
        axes.set_xlim(0, 118)
        axes.spines[["top", "right", "bottom", "left"]].set_visible(False)
        axes.tick_params(left=False, bottom=False, labelbottom=False)
        axes.set_title(corpus, fontsize="medium", loc="left")
    figure.axes[0].invert_yaxis()  # shared by all
    title = "Tokens to the loss at which tuned AdamW ends: less is better"
    figure.suptitle(title, fontsize="medium", x=0.01, ha="left")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def draw_rates(path: Path) -> None:
    """For each corpus the final loss against the learning rate, a line for each optimizer."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    colors: dict[str, str] = {}  # of an optimizer, in all panels
    for axes, (name, corpus) in zip(figure.subplots(1, len(CORPORA)), CORPORA.items(), strict=True):
        rows, comparison = tables.read(name)
        losses = losses_by_setting(rows)
        for s in comparison.summaries:
            points = sorted((x.learning_rate, by_seed[1]) for x, by_seed in losses[s.label].items())
            line = [(rate, loss) for rate, loss in points if math.isfinite(loss)]
            shade = colors.setdefault(s.label, f"C{len(colors)}")
            axes.plot(*zip(*line, strict=True), marker="o", markersize=4, linewidth=1.2, color=shade, label=s.label)
        axes.set(xscale="log", xlabel="learning rate", title=corpus)
        ticks: list[float] = []  # AdamW's first; no numbers on top of each other
        for by_setting in (losses[s.label] for s in comparison.summaries):
            for rate in sorted(setting.learning_rate for setting in by_setting):
                ticks += [rate] * all(rate > 1.5 * tick or tick > 1.5 * rate for tick in ticks)
        axes.set_xticks(sorted(ticks), [f"{rate:g}" for rate in sorted(ticks)], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    first: Any = figure.axes[0]
    first.set_ylabel("evaluation loss (nats per token), seed 1")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    draw_tokens(IMAGES / "comparison.png")
    draw_rates(IMAGES / "learning_rate.png")
    tables.main()
