"""Plans from the command line and from YAML files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..trainer.names import VARIANTS, nearest_optimizer
from ..trainer.optim_args import entries
from .errors import SweepError
from .plan import Plan, Setting, number

_KEYS = ("optimizers", "arguments", "learning_rate", "seeds", "final_seeds", "equal_budget")
_OURS = ("output_dir", "seed", "max_steps")  # the same for all; the sweep, or the command, sets them


def read_plan_file(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML plan holds.

    Raises:
        SweepError: no such file, no YAML, or a key that plans do not have.
    """
    import yaml

    try:
        plan = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise SweepError(f"cannot read the plan {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SweepError(f"the plan {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plan, dict) or not isinstance(plan.get("optimizers"), list) or not plan["optimizers"]:
        raise SweepError(f"the plan {path} needs a list named optimizers")
    for key in plan:
        if key not in _KEYS:
            raise SweepError(f"the plan {path} has {key!r}, which is none of {', '.join(_KEYS)}")
    return plan


def make_plan(
    command: list[str],
    optimizers: Sequence[str | Mapping[str, Any]],
    learning_rates: Sequence[Any] | None,
    shared: Mapping[str, Any] | None = None,
    *,
    seeds: int,
    final_seeds: int | None,
    equal_budget: bool = True,
) -> Plan:
    """A plan of entries, each a name or a mapping of arguments, whose lists are alternatives.

    Args:
        command: the user's.
        optimizers: names, or mappings with "optim", "label" where two have the same name, and further arguments.
        learning_rates: for the entries that have none of their own.
        shared: further arguments of every entry; an entry's own go before them.
        seeds: see `Plan`.
        final_seeds: see `Plan`; None for `seeds`.
        equal_budget: see `Plan`.

    Raises:
        SweepError: a value that cannot be; the message names it.
    """
    grids: dict[str, list[Setting]] = {}
    for entry in optimizers:
        fields = {"optim": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, Mapping) else {}
        if not isinstance(fields.get("optim"), str):
            raise SweepError(f"an optimizer of the plan is a name, or a mapping with `optim: name`, not {entry!r}")
        label = str(fields.pop("label", fields["optim"]))
        if label in grids:
            raise SweepError(f"two optimizers are called {label!r}: give them different labels in a plan file")
        fields = {"optim": fields["optim"], "learning_rate": learning_rates, **(shared or {}), **fields}
        grids[label] = _settings(label, fields)
    for name, value in (("seeds", seeds), ("final_seeds", final_seeds)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise SweepError(f"{name} must be a whole number of at least 1, not {value!r}")
    if final_seeds is not None and final_seeds < seeds:
        raise SweepError(f"final_seeds {final_seeds}: at least {seeds}, the seeds that every setting is trained with")
    plan = Plan(command, grids, seeds, seeds if final_seeds is None else final_seeds, equal_budget=bool(equal_budget))
    plan.check()
    return plan


def _settings(label: str, fields: Mapping[str, Any]) -> list[Setting]:
    for name in fields:
        if name in _OURS:
            raise SweepError(f"{label}: {name} is no setting of an optimizer; every run has the same")
    rates = _alternatives(fields["learning_rate"] if fields["learning_rate"] is not None else [])
    if not rates:
        raise SweepError(f"{label} has no learning rate: give --learning_rate, or learning_rate in the plan")
    columns: list[list[tuple[str, str]]] = []
    for name, value in fields.items():
        if name == "learning_rate":
            texts = [number(_rate(label, rate)) for rate in rates]
        elif name == "optim_args":
            texts = [text for alternative in _alternatives(value) for text in _optim_args(alternative)]
        else:
            texts = [_text(alternative) for alternative in _alternatives(value)]
        if not texts:
            raise SweepError(f"{label}: {name} has no value")
        columns.append([(name, text) for text in texts])
    # The learning rate changes fastest: whole curves over it come first in a sweep that stops early.
    columns.append(columns.pop(1))
    settings = [Setting(label, (row[0], row[-1], *row[1:-1])) for row in itertools.product(*columns)]
    if len(set(settings)) < len(settings):
        raise SweepError(f"{label} has the same setting twice")
    for setting in settings:
        _check_names(label, dict(setting.arguments))
    return settings


def _check_names(label: str, arguments: Mapping[str, str]) -> None:
    """Of MARS's optimizers the mistakes that show before anything is run; other names are the script's to judge."""
    name = arguments["optim"]
    if name not in VARIANTS:
        if "mars" in name.lower():
            raise SweepError(f"{label}: optim={name!r}: {nearest_optimizer(name)}")
        return
    try:
        entries(arguments.get("optim_args"), name)
    except ValueError as error:
        raise SweepError(f"{label}: {error}") from None


def _alternatives(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _rate(label: str, value: Any) -> float:
    try:
        rate = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        rate = math.nan
    if not 0 < rate < math.inf:
        raise SweepError(f"{label}: a learning rate is a number above 0, not {value!r}")
    return rate


def _optim_args(value: Any) -> list[str]:
    """`gamma=0.05,max_norm=none` of text or of a mapping, whose lists are alternatives again."""
    if not isinstance(value, Mapping):
        return [_text(value)]
    columns = [[f"{key}={_text(one)}" for one in _alternatives(many)] for key, many in value.items()]
    return [",".join(row) for row in itertools.product(*columns)]


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (Mapping, list)):
        raise SweepError(f"a setting's value is a number or a text, not {value!r}")
    return str(value)
