"""What is compared: each optimizer's settings, the seeds, and the command that they are added to."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .errors import SweepError

PLAN = "plan.json"


class Setting(NamedTuple):
    """Arguments of one optimizer.

    Attributes:
        label: the optimizer's name in tables and pictures.
        arguments: (name without dashes, value) in the order of the command line, "optim" and "learning_rate" first.
    """

    label: str
    arguments: tuple[tuple[str, str], ...]

    @property
    def learning_rate(self) -> float:
        return float(dict(self.arguments)["learning_rate"])

    @property
    def others(self) -> tuple[tuple[str, str], ...]:
        """The arguments without the learning rate."""
        return tuple(argument for argument in self.arguments if argument[0] != "learning_rate")

    @property
    def key(self) -> str:
        return " ".join([self.label, *self.command_line()])

    def at(self, learning_rate: float) -> Setting:
        """The same setting with another learning rate."""
        rate = number(learning_rate)
        return Setting(self.label, tuple((n, rate if n == "learning_rate" else v) for n, v in self.arguments))

    def command_line(self) -> list[str]:
        return [word for name, value in self.arguments for word in (f"--{name}", value)]

    def describe(self) -> str:
        """What tells it from the optimizer's other settings, for people."""
        others = [f"{name} {value}" for name, value in self.others if name != "optim"]
        return ", ".join([f"learning rate {self.learning_rate:g}", *others])

    def slug(self) -> str:
        """A name for a folder: readable, though two settings may share it."""
        return re.sub(r"[^\w.=-]+", "_", "-".join([self.label, f"{self.learning_rate:g}"]))[:60]


class Run(NamedTuple):
    """One training: a setting and a seed. With `timing` a short one, the given round of them."""

    setting: Setting
    seed: int
    timing: int = 0
    steps: int = 0  # of a timing run

    @property
    def key(self) -> str:
        short = f" --max_steps {self.steps} round {self.timing}" if self.timing else ""
        return f"{self.setting.key} --seed {self.seed}{short}"

    def arguments(self) -> list[str]:
        steps = ["--max_steps", str(self.steps)] if self.timing else []
        return [*self.setting.command_line(), "--seed", str(self.seed), *steps]


@dataclass
class Plan:
    """The comparison that an output folder holds.

    Attributes:
        command: the user's, as it was typed.
        optimizers: label -> settings of its grid. The first is the baseline.
        seeds: each setting is trained with the seeds 1 to this.
        final_seeds: each optimizer's best setting is trained with the seeds 1 to this.
        extensions: grids that were extended: {"side": "lower" or "upper", "settings": {label: setting}} each.
        equal_budget: whether optimizers must have the same number of settings.
    """

    command: list[str]
    optimizers: dict[str, list[Setting]]
    seeds: int = 2
    final_seeds: int = 2
    extensions: list[dict[str, Any]] = field(default_factory=list)
    equal_budget: bool = True

    def settings(self, label: str) -> list[Setting]:
        """An optimizer's grid with its extensions."""
        extended = [extension["settings"].get(label) for extension in self.extensions]
        return list(dict.fromkeys([*self.optimizers[label], *(s for s in extended if s is not None)]))

    def runs(self) -> list[Run]:
        """Seed by seed, and in turns, so that a sweep that stops early has spent about the same on each optimizer."""
        grids = [self.settings(label) for label in self.optimizers]
        longest = max(map(len, grids))
        return [
            Run(grid[i], seed)
            for seed in range(1, self.seeds + 1)
            for i in range(longest)
            for grid in grids
            if i < len(grid)
        ]

    def check(self, which: str = "") -> None:
        """Raise a SweepError where budgets are unequal; `which` says of what settings."""
        counts = {label: len(settings) for label, settings in self.optimizers.items()}
        if self.equal_budget and len(set(counts.values())) > 1:
            text = ", ".join(f"{label} {count}" for label, count in counts.items())
            raise SweepError(
                f"{which}the optimizers have unequal numbers of settings ({text}): give them equal ones, or say "
                "`equal_budget: false` in the plan"
            )

    # ---- the file ----

    def save(self, folder: Path) -> None:
        plan = {
            "command": self.command,
            "seeds": self.seeds,
            "final_seeds": self.final_seeds,
            "equal_budget": self.equal_budget,
            "optimizers": {label: [dict(s.arguments) for s in grid] for label, grid in self.optimizers.items()},
            "extensions": [
                {"side": e["side"], "settings": {label: dict(s.arguments) for label, s in e["settings"].items()}}
                for e in self.extensions
            ],
        }
        replace_text(folder / PLAN, json.dumps(plan, indent=1) + "\n")

    @staticmethod
    def load(folder: Path) -> Plan | None:
        """The plan that a folder holds, or None."""
        if not (folder / PLAN).is_file():
            return None
        stored = json.loads((folder / PLAN).read_text())
        optimizers = {
            label: [Setting(label, tuple(s.items())) for s in grid] for label, grid in stored["optimizers"].items()
        }
        extensions = [
            {
                "side": e["side"],
                "settings": {label: Setting(label, tuple(s.items())) for label, s in e["settings"].items()},
            }
            for e in stored["extensions"]
        ]
        return Plan(
            stored["command"],
            optimizers,
            stored["seeds"],
            stored["final_seeds"],
            extensions,
            stored["equal_budget"],
        )

    def added_to(self, stored: Plan, ran: Collection[str]) -> Plan:
        """The plan that a folder holds, with what this one adds.

        Args:
            stored: the folder's.
            ran: labels of optimizers of which a run has ended. Of the others nothing that is stored counts, so that a
                mistake can be taken back.

        Raises:
            SweepError: the commands differ; or the settings that were run make the budgets unequal.
        """
        if self.command != stored.command:
            raise SweepError(
                f"the output_dir holds a sweep of `{' '.join(stored.command)}`; another command needs another one"
            )
        optimizers: dict[str, list[Setting]] = {}
        for label, settings in stored.optimizers.items():
            if label in ran:
                optimizers[label] = list(settings)
        for label, settings in self.optimizers.items():
            known = optimizers.setdefault(label, [])
            known += [setting for setting in settings if setting not in known]
        plan = Plan(
            self.command,
            optimizers,
            max(self.seeds, stored.seeds),
            max(self.final_seeds, stored.final_seeds),
            stored.extensions,
            self.equal_budget and stored.equal_budget,
        )
        plan.check("with those that the output_dir has already, ")
        return plan


def number(value: float) -> str:
    """A learning rate as an argument, one text per number."""
    return repr(float(value))


def replace_text(path: Path, text: str) -> None:
    """Write a file that is never seen half written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
