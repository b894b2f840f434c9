"""report.md, and what is printed of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .compare import Row, losses_by_setting, setting_of
from .plan import PLAN, Plan, replace_text
from .plots import draw
from .store import read_results
from .summary import Comparison, Summary, as_json, compare, mean, verdict

REPORT = "report.md"
DOUBTFUL = 0.1  # relative difference of two timings of one setting from which the report warns


def report(folder: Path, pictures: bool = True) -> str:
    """Write report.md, report.json and the pictures of a sweep's folder, of results.jsonl and plan.json alone.

    Returns:
        What a terminal shows: the table and the verdicts.

    Raises:
        SweepError: the folder holds no sweep.
    """
    rows = read_results(folder)
    plan = Plan.load(folder)
    labels = list(dict.fromkeys([*(plan.optimizers if plan else ()), *(row["optimizer"] for row in rows)]))
    if not labels:
        return "no run has ended yet"
    comparison = compare(rows, labels)
    short = "\n".join([table(comparison), "", *(f"- {verdict(s, comparison)}" for s in comparison.summaries)])
    drawn = draw(folder, rows, comparison) if pictures else []
    text = ["# Sweep", "", short, "", *_notes(rows, plan, comparison), ""]
    text += [f"![{title}]({name})\n" for title, name in drawn]
    text += ["## Every setting", "", every_setting(rows), "", *_troubles(rows)]
    replace_text(folder / REPORT, "\n".join(text).rstrip() + "\n")
    replace_text(folder / "report.json", json.dumps(as_json(comparison), indent=1) + "\n")
    return short + ("" if plan is None else _missing(rows, plan))


def table(comparison: Comparison) -> str:
    unit = "tokens" if comparison.tokens_counted else "steps"
    head = ["optimizer", "best setting", "final loss", "difference ± standard error", f"{unit} to baseline's loss"]
    head += ["seconds to it", "seconds per step", "optimizer state", "runs (diverged, failed)"]
    lines = [head, ["---"] * len(head)]
    lines += [_cells(summary, comparison) for summary in comparison.summaries]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(s: Summary, comparison: Comparison) -> list[str]:
    runs = f"{s.complete + s.diverged + s.failed} ({s.diverged}, {s.failed})"
    if s.best is None:
        return [s.label, *["—"] * 7, runs]
    base = comparison.baseline
    difference = "baseline" if s is base else "—"
    if s.difference is not None:
        error = " (one seed)" if s.difference.error is None else f" ± {s.difference.error:.4f}"
        difference = f"{s.difference.mean:+.4f}{error}"
    steps = seconds = "—" if s is base else "not reached"
    if base.curve and (s is base or s.part_of_steps is not None):
        last = base.curve[-1]
        whole = last.tokens if comparison.tokens_counted and last.tokens else last.step
        part = 1.0 if s.part_of_steps is None else s.part_of_steps
        at_most = "≤ " * s.is_bound
        steps = f"{at_most}{part * whole:,.0f}"
        seconds = "not timed"
        if s.seconds_per_step is not None and (s is base or s.part_of_seconds is not None):
            seconds = f"{at_most}{part * last.step * s.seconds_per_step:,.1f}"
        if s is not base:
            steps += f" ({_percent(part)})"
            seconds += "" if s.part_of_seconds is None else f" ({_percent(s.part_of_seconds)})"
    return [
        s.label,
        s.best.describe() + (f" ({s.edge} edge)" if s.edge else ""),
        f"{mean(s.losses):.4f}",
        difference,
        steps,
        seconds,
        "—" if s.seconds_per_step is None else f"{s.seconds_per_step:.4g}",
        _state(s),
        runs,
    ]


def _state(s: Summary) -> str:
    if s.state_bytes is None:
        return "—"
    power, unit = next(
        (p, u) for p, u in ((9, "GB"), (6, "MB"), (3, "kB"), (0, "bytes")) if s.state_bytes >= 10**p or not p
    )
    size = f"{s.state_bytes / 10**power:.3g} {unit}"
    return f"{size}, {s.state_bytes / s.parameters:.1f} per parameter" if s.parameters else size


def _percent(part: float) -> str:
    return f"{part * 100:.0f} %"


def _notes(rows: list[Row], plan: Plan | None, comparison: Comparison) -> list[str]:
    """How the numbers came about."""
    kinds = {row["loss_of"] for row in rows if row["kind"] == "run" and row["loss_of"]}
    final = {
        "evaluation": "The final loss is that of the last evaluation.",
        "training": "Nothing was evaluated: the final loss is the mean of the last tenth of the training losses.",
    }
    notes = [final[kind] for kind in sorted(kinds)]
    curves = (
        "evaluation losses"
        if comparison.curve_kind == "evaluation"
        else "training losses, smoothed over a tenth of the steps"
    )
    notes.append(
        f"Curves, and where one reaches the baseline's last loss, are of {curves}, and means over seeds; between two "
        "points of a curve it is taken for straight, and ≤ says that its first point is below already."
    )
    settings = {s.label: s.settings for s in comparison.summaries}
    if len(set(settings.values())) > 1:
        text = ", ".join(f"{label} {count}" for label, count in settings.items())
        notes.append(f"**The optimizers had unequal numbers of settings: {text}.**")
    jobs = {row["jobs"] for row in rows if row["kind"] == "run"}
    timed = any(row["kind"] == "timing" for row in rows)
    if timed:
        notes.append(f"Seconds are from short runs of the best settings, one at a time, in turns.{_spread(rows)}")
    elif jobs - {1}:
        notes.append("Nothing was timed alone, and runs shared the machine, so there are no seconds.")
    else:
        notes.append("Seconds are of the runs themselves, one at a time; nothing was timed in turns.")
    notes += _warnings([row for row in rows if row["kind"] == "run" and row["status"] != "failed"])
    if plan is not None:
        seeds = "seed 1" if plan.seeds == 1 else f"seeds 1 to {plan.seeds}"
        note = f"Command: `{' '.join(plan.command)}`; every setting with {seeds}"
        if plan.final_seeds > plan.seeds:
            note += f", which chose the best ones; these with seeds 1 to {plan.final_seeds}"
        notes.append(f"{note}.")
        if plan.extensions:
            times = "once" if len(plan.extensions) == 1 else f"{len(plan.extensions)} times"
            notes.append(f"Every grid was extended alike, {times} ({PLAN}).")
        missing = _missing(rows, plan)
        if missing:
            notes.append(missing.strip())
    return [f"{note}\n" for note in notes]


def _spread(rows: list[Row]) -> str:
    """By how much the timing runs of one setting differ at most, relative to the shortest."""
    times: dict[Any, list[float]] = {}
    for row in rows:
        if row["kind"] == "timing" and row["seconds_per_step"] is not None:
            times.setdefault(setting_of(row), []).append(row["seconds_per_step"])
    spreads = [max(own) / min(own) - 1 for own in times.values() if len(own) > 1 and min(own) > 0]
    if not spreads:
        return ""
    text = f" Those of one setting differ by up to {_percent(max(spreads))}"
    if max(spreads) <= DOUBTFUL:
        return f"{text}."
    return f"{text}: **differences of that size mean nothing**; the machine had other work, or the runs are short."


def _warnings(runs: list[Row]) -> list[str]:
    """What makes the runs less comparable than they should be."""
    notes = []
    short = [row for row in runs if row["steps"] != row["max_steps"]]
    if short:
        notes.append(f"**{len(short)} runs stopped before their schedule's end.**")
    initial: dict[int, set[float | None]] = {}
    for row in runs:
        initial.setdefault(row["seed"], set()).add(row.get("initial"))
    if any(len(sums) > 1 for sums in initial.values()):
        notes.append(
            "**Runs of the same seed began from different weights**, so that pairing by seed is worth less: call "
            "`transformers.set_seed(args.seed)` in the script before the model is made."
        )
    for name in ("versions", "hardware", "git_commit"):
        if len({json.dumps(row[name]) for row in runs}) > 1:
            notes.append(f"**The runs differ in {name}** (results.jsonl).")
    return notes


def _missing(rows: list[Row], plan: Plan) -> str:
    made = {(r["optimizer"], tuple(r["arguments"].items()), r["seed"]) for r in rows if r["kind"] == "run"}
    runs = [run for run in plan.runs() if (run.setting.label, run.setting.arguments, run.seed) not in made]
    if not runs:
        return ""
    names = "; ".join(f"{run.setting.label}, {run.setting.describe()}, seed {run.seed}" for run in runs)
    return f"\n\nNot run yet ({len(runs)} runs): {names}"


def every_setting(rows: list[Row]) -> str:
    """The final loss of every run, diverged and failed ones too."""
    marks = {
        (r["optimizer"], tuple(r["arguments"].items()), r["seed"]): r["status"] for r in rows if r["kind"] == "run"
    }
    lines = ["| optimizer | setting | final loss of each seed | mean |", "| --- | --- | --- | --- |"]
    for label, settings in losses_by_setting(rows).items():
        for setting, losses in sorted(settings.items(), key=lambda item: (item[0].others, item[0].learning_rate)):
            cells = []
            for seed, loss in sorted(losses.items()):
                status = marks[label, setting.arguments, seed]
                words = [f"{loss:.4f}"] * math.isfinite(loss) + [status] * (status != "complete")
                cells.append(" ".join(words))
            average = sum(losses.values()) / len(losses)
            shown = f"{average:.4f}" if math.isfinite(average) else "—"
            lines.append(f"| {label} | {setting.describe()} | {', '.join(cells)} | {shown} |")
    return "\n".join(lines)


def _troubles(rows: list[Row]) -> list[str]:
    failed = [row for row in rows if row["status"] == "failed"]
    lines = ["## Failed runs", ""] if failed else []
    for row in failed:
        lines += [f"{row['folder']}: {row['problem']}", "", "```", *row["stderr"], "```", ""]
    return lines
