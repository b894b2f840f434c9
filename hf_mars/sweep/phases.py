"""The order of a sweep: the grids, their extensions, further seeds of the best settings, their timing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .compare import best_settings, edge, extended, losses_by_setting
from .curves import SMOOTHING
from .plan import Plan, Run, Setting
from .runner import Runner
from .store import Store

TIMING_ROUNDS = 2  # in turns, so that what else the machine does falls on all


def sweep(plan: Plan, folder: Path, store: Store, runner: Runner, *, max_extensions: int, timing_steps: int) -> bool:
    """Make all runs of a plan that have not been made. False if the time did not suffice for some."""
    reserve = 0.0

    def make(runs: list[Run]) -> bool:
        nonlocal reserve
        reserve = timing_time(store, plan, timing_steps)
        return not runner.make(runs, reserve=reserve)

    if not make(plan.runs()):
        return False
    _complete_extensions(plan, store)
    done = make(plan.runs())
    while done and len(plan.extensions) < max_extensions:
        sides = wanted_sides(plan, store)
        if not sides:
            break
        for side in sides:
            settings = {label: one_further(plan, store, label, side) for label in plan.optimizers}
            plan.extensions.append({"side": side, "settings": settings})
            print(f"a best learning rate is at the {side} edge: every grid gets one more", file=sys.stderr)
        plan.save(folder)
        done = make(plan.runs())
    best = best_of(plan, store)
    if done and plan.final_seeds > plan.seeds:
        seeds = range(plan.seeds + 1, plan.final_seeds + 1)
        done = make([Run(setting, seed) for seed in seeds for setting in best.values() if setting])
    if timing_steps:
        rounds = range(1, TIMING_ROUNDS + 1)
        runs = [Run(s, 1, n, timing_steps) for n in rounds for s in best.values() if s]
        done = not runner.make(runs, jobs=1) and done
    return done


def best_of(plan: Plan, store: Store) -> dict[str, Setting | None]:
    """By the grids' seeds alone, so that further seeds of the best settings do not choose among them."""
    return best_settings(_losses(plan, store))


def _losses(plan: Plan, store: Store) -> dict[str, dict[Setting, dict[int, float]]]:
    keys = [run.key for run in plan.runs()]
    rows = store.rows
    return losses_by_setting(rows[key] for key in keys if key in rows)


def wanted_sides(plan: Plan, store: Store) -> list[str]:
    """The sides on which some optimizer's best learning rate is the outermost."""
    losses = _losses(plan, store)
    found = {edge(best, losses[label]) for label, best in best_settings(losses).items() if best}
    return [side for side in ("lower", "upper") if side in found]


def one_further(plan: Plan, store: Store, label: str, side: str) -> Setting:
    """An optimizer's next setting on a side, beside its best one; beside its first one if all diverged."""
    best = best_of(plan, store).get(label) or plan.optimizers[label][0]
    return extended(best, plan.settings(label), side)


def _complete_extensions(plan: Plan, store: Store) -> None:
    """Optimizers that were added to a plan after its grids were extended get as many settings more."""
    for extension in plan.extensions:
        for label in plan.optimizers:
            if label not in extension["settings"]:
                extension["settings"][label] = one_further(plan, store, label, extension["side"])


def timing_time(store: Store, plan: Plan, timing_steps: int) -> float:
    """About the seconds that the timing will take: starting up, and some steps, for each optimizer and round."""
    if not timing_steps:
        return 0.0
    total = 0.0
    for label in plan.optimizers:
        rows: list[dict[str, Any]] = [
            row
            for row in store.rows.values()
            if row["optimizer"] == label and row["kind"] == "run" and row["status"] != "failed" and row["seconds"]
        ]
        if rows:
            row = rows[-1]
            total += TIMING_ROUNDS * (row["wall_seconds"] - row["seconds"] * (1 - timing_steps / row["steps"]))
    return max(total, 0.0) * (1 + SMOOTHING)
