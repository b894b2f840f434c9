"""Write the tables of README.md and docs/ that come from benchmarks/results alone: `make pictures`.

A page has `<!-- table: KIND NAME… -->`, the table, and `<!-- end -->`; NAME is a file of benchmarks/results.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hf_mars.sweep.compare import losses_by_setting, paired
from hf_mars.sweep.plan import Setting
from hf_mars.sweep.summary import Comparison, Summary, compare, mean

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/comparison.md", "docs/guide.md")
MARKED = re.compile(r"(<!-- table: ([\w ]+?) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]


def read(name: str) -> tuple[list[Row], Comparison]:
    """The rows of a file of results, and their comparison with the first optimizer of the plan."""
    rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    labels = list(dict.fromkeys(row["optimizer"] for row in rows))
    return rows, compare(rows, sorted(labels, key=lambda label: not label.startswith("adamw")))


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines]) + "\n"


def plus_minus(difference: Any) -> str:
    error = "" if difference.error is None else f" ± {difference.error:.3f}"
    return f"{difference.mean:+.3f}{error}".replace("-", "−")


def percent(part: float | None) -> str:
    return "not reached" if part is None else f"{part * 100:.0f} %"


def summary(name: str) -> str:
    """Each optimizer at its best learning rate."""
    _, comparison = read(name)
    base = comparison.baseline
    head = ["optimizer", "learning rate", "seeds", "loss", f"difference from {base.label}"]
    head += ["steps to its loss", "seconds to it", "bytes of state per parameter"]
    lines = []
    for s in comparison.summaries:
        if s.best is None:
            lines.append([s.label, "none came through", *["—"] * 6])
            continue
        at_edge = {"lower": " (lowest tried)", "upper": " (highest tried)", None: ""}[s.edge]
        others = ["—", "—", "—"]
        if s.difference is not None:
            seconds = "—" if s.part_of_steps is not None and s.part_of_seconds is None else percent(s.part_of_seconds)
            others = [plus_minus(s.difference), percent(s.part_of_steps), seconds]
        rate, loss = f"{s.best.learning_rate:g}{at_edge}", f"{mean(s.losses):.3f}"
        lines.append([s.label, rate, str(len(s.losses)), loss, *others, state(s)])
    return markdown(head, lines)


def state(s: Summary) -> str:
    return "—" if not s.state_bytes or not s.parameters else f"{s.state_bytes / s.parameters:.1f}"


def rates(name: str) -> str:
    """The loss at every learning rate, over the seeds that all settings have."""
    rows, comparison = read(name)
    losses = losses_by_setting(rows)
    settings = [setting for by_setting in losses.values() for setting in by_setting]
    seeds = set.intersection(*(set(by_seed) for by in losses.values() for by_seed in by.values()))
    head = ["optimizer", *(f"{rate:g}" for rate in sorted({s.learning_rate for s in settings}))]
    lines = []
    for s in comparison.summaries:
        at: dict[str, str] = {}
        for setting, by_seed in losses.get(s.label, {}).items():
            at[f"{setting.learning_rate:g}"] = loss_cell(by_seed, seeds)
        lines.append([s.label, *(at.get(rate, "") for rate in head[1:])])
    return markdown(head, lines)


def loss_cell(by_seed: dict[int, float], seeds: set[int]) -> str:
    average = mean({seed: by_seed[seed] for seed in seeds})
    return f"{average:.3f}" if average == average else "diverged"


def at_the_baselines_rate(name: str, label: str) -> Any:
    """The paired difference of an optimizer from the baseline, both at the baseline's best learning rate."""
    rows, comparison = read(name)
    base = comparison.baseline
    losses = losses_by_setting(rows)
    assert base.best is not None
    own = [by for setting, by in losses[label].items() if setting.learning_rate == base.best.learning_rate]
    return paired(own[0], losses[base.label][base.best]) if own else None


def best_of(name: str, label: str) -> tuple[Setting | None, Summary]:
    _, comparison = read(name)
    found = next(s for s in comparison.summaries if s.label == label)
    return found.best, found


KINDS = {"summary": summary, "rates": rates}


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
