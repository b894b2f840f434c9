"""A resumed run does what its arguments say: settings that were given take effect, others stay as they were saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN
from transformers.utils import logging

from ..optim import MarsShampoo
from ..optim.form import Form, form_of_settings
from ..optim.groups import Group
from ..optim.mars import Mars
from ..optim.state import convert_states
from .arguments import MarsTrainingArguments
from .checkpoints import MANIFEST, other_meaning, other_optimizer
from .defaults import transformers_default
from .model_card import mars_inside
from .names import VARIANTS, optim_name
from .options import parse_optim_args

logger = logging.get_logger(__name__)

# Settings of a group that may change under a state. "betas" and "lr" have rules of their own below.
CHANGEABLE = (
    *("gamma", "max_norm", "eps", "weight_decay", "ns_steps"),
    *("last_grad_dtype", "state_dtype", "kahan_sum", "skip_nonfinite", "foreach", "fused"),
)
# A field of TrainingArguments that sets a hyperparameter, and that one's name in messages.
_FIELDS = {"adam_beta1": "beta1", "adam_beta2": "beta2", "adam_epsilon": "eps"} | {
    name: name for name in ("learning_rate", "weight_decay")
}


class Made(NamedTuple):
    """An optimizer that a Trainer made from a name.

    Attributes:
        given: the hyperparameters that its arguments give, by their names in `optim_args`, and "learning_rate" and
            "weight_decay".
        groups: its param_groups as they were made, without the parameters.
        name: the name.
        is_empty: whether each group had no parameters.
    """

    given: frozenset[str]
    groups: list[Group]
    name: str
    is_empty: list[bool]

    def without_empty_groups(self) -> Made:
        """As DeepSpeed leaves an optimizer: with LoRA there may be no 1d parameter."""
        groups = [own for own, is_empty in zip(self.groups, self.is_empty, strict=True) if not is_empty]
        return self._replace(groups=groups, is_empty=[False] * len(groups))


_made: WeakKeyDictionary[Mars, Made] = WeakKeyDictionary()


def given(args: TrainingArguments) -> frozenset[str]:
    """The hyperparameters that `args` give explicitly.

    A field of TrainingArguments counts as given where its value is not transformers' default, since they do not keep
    what was written; MarsTrainingArguments do for the betas, and run_clm.py for its command line.

    Args:
        args: with a MARS name as `optim`.
    """
    names = set(parse_optim_args(args.optim_args, optim_name(args)))
    for field, name in _FIELDS.items():
        if isinstance(args, MarsTrainingArguments) and field in ("adam_beta1", "adam_beta2"):
            if field in args.given_betas:
                names.add(name)
        elif field in getattr(args, "given_fields", ()) or getattr(args, field) != transformers_default(field):
            names.add(name)
    return frozenset(names)


def remember(optimizer: Optimizer, args: TrainingArguments) -> None:
    """Note how an optimizer was made from a name, for the checkpoint that may be loaded into it."""
    mars = mars_inside(optimizer)
    if mars is not None:
        groups = [{key: value for key, value in group.items() if key != "params"} for group in mars.param_groups]
        is_empty = [not group["params"] for group in mars.param_groups]
        _made[mars] = Made(given(args), groups, optim_name(args), is_empty)


def check_optimizer(trainer: Trainer, folder: Path) -> None:
    """Refuse the optimizer's state in a checkpoint of another one, where there is no manifest that tells of it.

    Stock Trainers write none. The tensors in the file are not read.

    Args:
        trainer: with its optimizer.
        folder: of the checkpoint.

    Raises:
        ResumeError: one of the two is MARS's, and the other is none or of another class.
    """
    if (folder / MANIFEST).exists():
        return
    file = next(filter(Path.is_file, (folder / name for name in (OPTIMIZER_NAME, OPTIMIZER_NAME_BIN))), None)
    saved = None if file is None else _name_of_state(file)
    mars = mars_inside(trainer.optimizer)
    if saved is None or (mars is not None and VARIANTS[saved].class_name == type(mars).__name__):
        return
    raise other_optimizer(folder, saved, optim_name(trainer.args))


def _name_of_state(file: Path) -> str | None:
    """The MARS name of an optimizer's state; None if it is of no MARS optimizer, or of no file that torch can read."""
    try:
        groups = torch.load(file, map_location="cpu", mmap=True, weights_only=True)["param_groups"]
        updates = {group.get("update"): group.get("adjust_lr_fn") for group in groups}
    except Exception:  # the Trainer, which reads it next, says so
        return None
    if "shampoo" in updates:
        return "mars_m" if updates["shampoo"] == "match_rms_adamw" else "mars_shampoo"
    return "mars_lion" if "lion" in updates else "mars_adamw" if "adamw" in updates else None


def apply_given(trainer: Trainer) -> None:
    """After a checkpoint is loaded: give the optimizer and the scheduler the settings that were given, and log it.

    Does nothing to an optimizer that was not made from a name.

    Args:
        trainer: its optimizer and scheduler hold what was saved.

    Raises:
        ValueError: a setting would change the meaning of the saved state. The message names it and both values.
    """
    mars = mars_inside(trainer.optimizer)
    made = None if mars is None else _made.get(mars)
    if mars is None or made is None:
        return
    if not mars.state:
        logger.warning("the checkpoint has no state for the optimizer (optimizer.pt or scheduler.pt): it starts anew")
        return
    if len(mars.param_groups) != len(made.groups):
        made = made.without_empty_groups()
    changes: dict[str, tuple[Any, Any]] = {}
    kept: dict[str, tuple[Any, Any]] = {}
    for group, own in zip(mars.param_groups, made.groups, strict=True):
        _check_structure(mars, made, group, own)
    for group, own in zip(mars.param_groups, made.groups, strict=True):
        before = dict(group)
        for name, key, old, new in _differences(mars, group, own):
            if name not in made.given:
                kept.setdefault(name, (old, new))
                continue
            changes.setdefault(name, (old, new))
            group[key] = new if key != "betas" else _with_beta(group["betas"], name, new)
        if form_of_settings(before) is Form.ONE_TENSOR and form_of_settings(group) is Form.APPROX:
            raise ValueError(
                f"the checkpoint's states hold no previous gradients, since they were saved with max_norm="
                f"{before['max_norm']} and gamma={before['gamma']}; with max_norm={group['max_norm']} and gamma="
                f"{group['gamma']} they would be needed: leave out what changes it"
            )
    convert_states(mars.param_groups, mars.state)
    _apply_learning_rates(trainer, mars, made, changes, kept)
    if changes:
        logger.warning("resumed with " + ", ".join(f"{name}: {old} → {new}" for name, (old, new) in changes.items()))
    if kept:
        logger.warning(
            "kept from the checkpoint, since this run's arguments do not give it: "
            + ", ".join(f"{name}={old} (otherwise {new})" for name, (old, new) in kept.items())
        )


def _is_plain(mars: Mars, group: Group) -> bool:
    """Whether this optimizer gives a group of that kind AdamW with `betas_1d`, uncorrected."""
    return "betas" in mars._settings_of_kind(group["kind"], mars.defaults)


def _check_structure(mars: Mars, made: Made, saved: Group, own: Group) -> None:
    """Refuse what would change the meaning of the saved state."""

    def refuse(setting: str, old: Any, new: Any) -> None:
        raise ValueError(other_meaning(setting, old, new, made.name))

    for key in ("kind", "update", "layout", "exact"):
        if saved[key] != own[key]:
            refuse(key, saved[key], own[key])
    by_name = isinstance(mars, MarsShampoo) or "adjust_lr_fn" in made.given
    if by_name and saved["adjust_lr_fn"] != own["adjust_lr_fn"]:
        names = {VARIANTS[name].fixed.get("adjust_lr_fn", "original"): name for name in ("mars_shampoo", "mars_m")}
        if isinstance(mars, MarsShampoo) and "adjust_lr_fn" not in made.given:
            refuse("optim", names[saved["adjust_lr_fn"]], made.name)
        refuse("adjust_lr_fn", saved["adjust_lr_fn"], own["adjust_lr_fn"])
    was_plain = saved["gamma"] == 0 and saved["max_norm"] is None
    if own["kind"] == "1d" and "optimize_1d" in made.given and _is_plain(mars, own) != was_plain:
        refuse("optimize_1d", not was_plain, was_plain)


def _differences(mars: Mars, saved: Group, own: Group) -> Iterator[tuple[str, str, Any, Any]]:
    """What differs but for learning rates: (name in optim_args, key of the group, saved value, this run's value)."""
    plain = _is_plain(mars, own)
    for key in CHANGEABLE:
        if key in own and key in saved and saved[key] != own[key] and not (plain and key in ("gamma", "max_norm")):
            yield key, key, saved[key], own[key]
    names = ("beta1_1d", "beta2_1d") if plain else ("beta1", "beta2")
    for name, old, new in zip(names, saved["betas"], own["betas"], strict=True):
        if old != new:
            yield name, "betas", old, new


def _with_beta(betas: tuple[float, float], name: str, value: float) -> tuple[float, float]:
    return (value, betas[1]) if name.startswith("beta1") else (betas[0], value)


def _apply_learning_rates(
    trainer: Trainer,
    mars: Mars,
    made: Made,
    changes: dict[str, tuple[Any, Any]],
    kept: dict[str, tuple[Any, Any]],
) -> None:
    """Scale each group's learning rate, and the base that its scheduler goes on from."""
    scheduler = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
    bases = getattr(scheduler, "base_lrs", None)
    if bases is None:  # ReduceLROnPlateau has only the rates themselves
        bases = [group["lr"] for group in mars.param_groups]
    rules = [_has_own_rate(mars, own) for own in made.groups]
    mains = [(bases[i], own["lr"]) for i, own in enumerate(made.groups) if not rules[i]]
    saved_main, own_main = mains[0] if mains else (None, None)
    for i, (group, own) in enumerate(zip(mars.param_groups, made.groups, strict=True)):
        name = "lr_1d" if rules[i] else "learning_rate"
        old = new = bases[i]
        if name in made.given:
            new = own["lr"]
        elif rules[i] and "learning_rate" in made.given and saved_main:
            new = old * (own_main / saved_main)  # it keeps its ratio to the learning rate
        if new == old:
            if old != own["lr"]:
                kept.setdefault(name, (old, own["lr"]))
            continue
        changes.setdefault(name, (old, new))
        group["lr"] = group["lr"] * (new / old) if old else new
        if "initial_lr" in group:
            group["initial_lr"] = new
        bases[i] = new
    if scheduler is not None and hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = [group["lr"] for group in mars.param_groups]


def _has_own_rate(mars: Mars, group: Group) -> bool:
    """Whether groups of that kind have `lr_1d`."""
    return "lr" in mars._settings_of_kind(group["kind"], mars.defaults)
