"""The order of a sweep: the grids, their extensions, further seeds of the best settings, their timing."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from .compare import best_settings, edge, extended, losses_by_setting
from .plan import Plan, Run, Setting
from .runner import Runner
from .store import Store

TIMING_ROUNDS = 2  # in turns, so that what else the machine does falls on all


@dataclass
class Sweep:
    """A plan under way.

    Attributes:
        plan: what to run; its grids grow.
        folder: where the plan is stored.
        store: the rows.
        runner: makes the runs.
        max_extensions: how often the grids may grow, each time on one side.
        timing_steps: the length of timing runs; 0 for none.
    """

    plan: Plan
    folder: Path
    store: Store
    runner: Runner
    max_extensions: int
    timing_steps: int

    def run(self) -> bool:
        """Make all runs that have not been made. False if the time did not suffice for some."""
        done = self._grids() and self._final_seeds()
        timing = self._timing_runs(self.best())
        return not self.runner.make([*self._known(), *timing], only=timing, jobs=1) and done

    def best(self) -> dict[str, Setting | None]:
        """By the grids' seeds alone, so that further seeds of the best settings do not choose among them."""
        return best_settings(self._losses())

    def wanted_sides(self) -> list[str]:
        """The sides on which some optimizer's best learning rate is the outermost."""
        losses = self._losses()
        found = {edge(best, losses[label]) for label, best in best_settings(losses).items() if best}
        return [side for side in ("lower", "upper") if side in found]

    def _grids(self) -> bool:
        done = self._make_grids()
        if done and self._complete_extensions():
            done = self._make_grids()
        while done and len(self.plan.extensions) < self.max_extensions:
            sides = self.wanted_sides()[: self.max_extensions - len(self.plan.extensions)]
            if not sides:
                break
            for side in sides:
                settings = {label: self._one_further(label, side) for label in self.plan.optimizers}
                self.plan.extensions.append({"side": side, "settings": settings})
                print(f"a best learning rate is the {side} end of its grid: every grid gets one more", file=sys.stderr)
            self.plan.save(self.folder)
            done = self._make_grids()
        return done

    def _make_grids(self) -> bool:
        stand_ins = {label: settings[0] for label, settings in self.plan.optimizers.items()}
        later = [*self._final_runs(stand_ins), *self._timing_runs(stand_ins)]
        return not self.runner.make(self.plan.runs(), later=later)

    def _final_seeds(self) -> bool:
        best = self.best()
        return not self.runner.make(self._known(), later=self._timing_runs(best))

    def _known(self) -> list[Run]:
        return [*self.plan.runs(), *self._final_runs(self.best())]

    def _final_runs(self, best: dict[str, Setting | None] | dict[str, Setting]) -> list[Run]:
        seeds = range(self.plan.seeds + 1, self.plan.final_seeds + 1)
        return [Run(setting, seed) for seed in seeds for setting in best.values() if setting]

    def _timing_runs(self, best: dict[str, Setting | None] | dict[str, Setting]) -> list[Run]:
        rounds = range(1, TIMING_ROUNDS + 1) if self.timing_steps else ()
        return [Run(setting, 1, n, self.timing_steps) for n in rounds for setting in best.values() if setting]

    def _losses(self) -> dict[str, dict[Setting, dict[int, float]]]:
        rows = self.store.rows
        return losses_by_setting(rows[run.key] for run in self.plan.runs() if run.key in rows)

    def _one_further(self, label: str, side: str) -> Setting:
        """An optimizer's next setting on a side, beside its best one; beside its first one if none came through."""
        best = self.best().get(label) or self.plan.optimizers[label][0]
        return extended(best, self.plan.settings(label), side)

    def _complete_extensions(self) -> bool:
        """Give optimizers that were added to a plan after its grids had grown as many settings more."""
        changed = False
        for extension in self.plan.extensions:
            for label in self.plan.optimizers:
                if label not in extension["settings"]:
                    extension["settings"][label] = self._one_further(label, extension["side"])
                    changed = True
        if changed:
            self.plan.save(self.folder)
        return changed
