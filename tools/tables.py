"""Write the tables of README.md and docs/ that come from benchmarks/results alone: `make pictures`.

A page has `<!-- table: KIND NAME… -->`, the table, and `<!-- end -->`; NAME is a file of benchmarks/results.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hf_mars.sweep.compare import losses_by_setting, paired, setting_of
from hf_mars.sweep.summary import Comparison, Summary, compare, mean

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/comparison.md", "docs/guide.md")
MARKED = re.compile(r"(<!-- table: ([\w ]+?) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]


def read(name: str) -> tuple[list[Row], Comparison]:
    """The rows of a file of results, and their comparison with AdamW, of two the one with the shorter average of v."""
    rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    labels = {row["optimizer"] for row in rows}  # which run ended first is chance
    return rows, compare(rows, sorted(labels, key=lambda label: (not label.startswith("adamw"), label)))


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines]) + "\n"


def plus_minus(difference: Any) -> str:
    error = "" if difference.error is None else f" ± {difference.error:.3f}"
    return f"{difference.mean:+.3f}{error}".replace("-", "−")


def percent(part: float | None) -> str:
    return "not reached" if part is None else f"{part * 100:.0f} %"


def summary(name: str) -> str:
    """Each optimizer at its best learning rate; steps where there are curves, seconds where they were measured."""
    rows, comparison = read(name)
    base = comparison.baseline
    curves = comparison.curve_kind == "evaluation"
    timed = any(row["kind"] == "timing" for row in rows)
    head = ["optimizer", "learning rate", "seeds", "loss", f"difference from {base.label}"]
    head += ["steps to its loss"] * curves + ["seconds to it"] * timed + ["bytes of state per parameter"]
    lines = []
    for s in comparison.summaries:
        if s.best is None:
            lines.append([s.label, "none came through", *["—"] * (len(head) - 2)])
            continue
        at_edge = AT_EDGE[s.edge]
        rate, loss = f"{s.best.learning_rate:g}{at_edge}", f"{mean(s.losses):.3f}"
        difference, steps, seconds = "—", "—", "—"
        if s.difference is not None:
            difference, steps = plus_minus(s.difference), percent(s.part_of_steps)
            seconds = percent(s.part_of_seconds)
        measured = [steps] * curves + [seconds] * timed
        lines.append([s.label, rate, str(len(s.losses)), loss, difference, *measured, state(s)])
    return markdown(head, lines)


def state(s: Summary) -> str:
    return "—" if not s.state_bytes or not s.parameters else f"{s.state_bytes / s.parameters:.1f}"


def rates(name: str) -> str:
    """The loss at every learning rate, over the seeds that all settings have."""
    rows, comparison = read(name)
    losses = losses_by_setting(rows)
    seeds = set.intersection(*(set(by_seed) for by in losses.values() for by_seed in by.values()))
    diverged = {(setting_of(row), row["seed"]) for row in rows if row["status"] == "diverged"}
    by_grid: dict[tuple[float, ...], list[list[str]]] = {}  # of optimizers with the same learning rates
    for s in comparison.summaries:
        at = {
            setting.learning_rate: loss_cell(by_seed, seeds, {seed for seed in seeds if (setting, seed) in diverged})
            for setting, by_seed in losses[s.label].items()
        }
        by_grid.setdefault(tuple(sorted(at)), []).append([s.label, *(at[rate] for rate in sorted(at))])
    grids = [markdown(["learning rate", *(f"{rate:g}" for rate in grid)], lines) for grid, lines in by_grid.items()]
    return "\n".join(grids)


def loss_cell(by_seed: dict[int, float], seeds: set[int], diverged: set[int]) -> str:
    average = mean({seed: by_seed[seed] for seed in seeds})
    words = [f"{average:.3f}"] * (average == average) + ["diverged"] * bool(diverged or average != average)
    return " ".join(words)


def at_the_baselines_rate(name: str, label: str) -> Any:
    """The paired difference of an optimizer from the baseline, both at the baseline's best learning rate."""
    rows, comparison = read(name)
    base = comparison.baseline
    losses = losses_by_setting(rows)
    assert base.best is not None
    own = [by for setting, by in losses[label].items() if setting.learning_rate == base.best.learning_rate]
    return paired(own[0], losses[base.label][base.best]) if own else None


# The rows of the overview: results, task.
TASKS = {
    "pretrain_prose": "from scratch, prose",
    "pretrain_docs": "from scratch, documentation",
    "size": "from scratch, prose, 11.5M parameters",
    "finetune": "full fine-tuning",
    "lora": "LoRA",
    "finetune_real": "full fine-tuning, SmolLM2-135M",
    "lora_real": "LoRA, SmolLM2-135M",
}
AT_EDGE = {"lower": " (lowest tried)", "upper": " (highest tried)", None: ""}
ADAMW, MARS_M = "mars_adamw, rate matched", "mars_m (0.9, 0.99) γ 0.05"


def overview() -> str:
    """Of every task the differences from AdamW: at AdamW's own best learning rate, and at the best of each."""
    head = ["difference from AdamW, nats", "AdamW's best rate", "mars_adamw there", "at its best rate"]
    head += ["mars_m there", "at its best rate"]
    lines = []
    for name, task in TASKS.items():
        _, comparison = read(name)
        base = comparison.baseline
        assert base.best is not None
        cells = [task, f"{base.best.learning_rate:g}{AT_EDGE[base.edge]}"]
        for label in (ADAMW, MARS_M):
            s = next(s for s in comparison.summaries if s.label == label)
            at_rate = at_the_baselines_rate(name, label)
            assert s.best is not None and s.difference is not None
            ratio = s.best.learning_rate / base.best.learning_rate
            best = f"{plus_minus(s.difference)} at {ratio:.2g} ×{AT_EDGE[s.edge]}"
            cells += ["not run" if at_rate is None else plus_minus(at_rate), best]
        lines.append(cells)
    return markdown(head, lines)


def shorter(whole: str, part: str) -> str:
    """mars_m in a complete schedule of fewer steps, beside AdamW in all of them, at the best rate of each."""
    rows, comparison = read(whole)
    base = comparison.baseline
    short_rows, short = read(part)
    best = short.summaries[0]
    difference = paired(best.losses, base.losses)
    steps = {row["steps"] for row in short_rows}, {row["steps"] for row in rows if row["kind"] == "run"}
    head = ["", "steps", "learning rate", "seeds", "loss", "difference"]
    lines = []
    for summary_of, count, ending in ((base, max(steps[1]), "—"), (best, max(steps[0]), plus_minus(difference))):
        assert summary_of.best is not None
        rate, loss = f"{summary_of.best.learning_rate:g}", f"{mean(summary_of.losses):.3f}"
        lines.append([summary_of.label, str(count), rate, str(len(summary_of.losses)), loss, ending])
    return markdown(head, lines)


def differences(name: str) -> str:
    """Each row of an ablation beside the one with the optimizer's name alone, paired by seed."""
    rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    labels = dict.fromkeys(row["optimizer"] for row in rows)
    comparison = compare(rows, sorted(labels, key=lambda label: not label.startswith("mars_")))
    head = ["", "seeds", "loss", f"difference from {comparison.baseline.label}"]
    lines = [
        [
            s.label,
            str(len(s.losses)),
            f"{mean(s.losses):.3f}",
            "—" if s.difference is None else plus_minus(s.difference),
        ]
        for s in comparison.summaries
    ]
    return markdown(head, lines)


KINDS = {
    "summary": summary,
    "differences": differences,
    "rates": rates,
    "overview": overview,
    "shorter": shorter,
}


def filled(text: str) -> str:
    """A page with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        kind, *names = match[2].split()
        return match[1] + KINDS[kind](*names) + match[3]

    return MARKED.sub(table, text)


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
