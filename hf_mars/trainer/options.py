"""``optim_args``: from the user's text to typed, checked arguments of an optimizer."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import ParallelMode
from transformers.utils import logging

from ..optim import MarsAdamW, MarsLion, MarsShampoo, parameter_roles
from ..optim.hyperparameters import RANGES, check_hyperparameters
from ..optim.kernels.cpu import is_compiled
from ..optim.mars import Mars
from .arguments import BETA_DEFAULTS, MarsTrainingArguments, transformers_default
from .engines import check_engine
from .registry import mars_name

logger = logging.get_logger(__name__)


class Variant(NamedTuple):
    """A registered optimizer name: its class, and the arguments that the name itself stands for."""

    optimizer_cls: type[Mars]
    fixed: Mapping[str, Any] = MappingProxyType({})


VARIANTS = {
    "mars_adamw": Variant(MarsAdamW),
    "mars_lion": Variant(MarsLion),
    "mars_shampoo": Variant(MarsShampoo),
    "mars_m": Variant(MarsShampoo, {"adjust_lr_fn": "match_rms_adamw"}),
}


# ---- values ----


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _bool(text: str) -> bool:
    return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]


def _or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text.lower() == "none" else parse(text)


_BETA = ("a number in [0, 1)", _float, lambda v: 0 <= v < 1)


def _as_in_optimizer(name: str, parse: Callable[[str], Any]):
    allowed, is_allowed = RANGES[name]
    return (allowed.replace("True or False", "true or false").replace("None", "none"), parse, is_allowed)


# One row an option: what it must be, how its text is read, the test of the value.
OPTIONS: dict[str, tuple[str, Callable[[str], Any], Callable[[Any], bool]]] = {
    "gamma": _as_in_optimizer("gamma", _float),
    "max_norm": _as_in_optimizer("max_norm", _or_none(_float)),
    "exact": _as_in_optimizer("exact", _bool),
    "beta1": _BETA,
    "beta2": _BETA,
    "eps": _as_in_optimizer("eps", _float),
    "lr_1d": _as_in_optimizer("lr_1d", _or_none(_float)),
    "beta1_1d": _BETA,
    "beta2_1d": _BETA,
    "optimize_1d": _as_in_optimizer("optimize_1d", _bool),
    "last_grad_dtype": _as_in_optimizer("last_grad_dtype", _or_none(str)),
    "state_dtype": _as_in_optimizer("state_dtype", _or_none(str)),
    "kahan_sum": _as_in_optimizer("kahan_sum", _or_none(_bool)),
    "foreach": _as_in_optimizer("foreach", _or_none(_bool)),
    "fused": _as_in_optimizer("fused", _or_none(_bool)),
}
SHAMPOO_OPTIONS = {
    "ns_steps": _as_in_optimizer("ns_steps", _or_none(int)),
    "adjust_lr_fn": _as_in_optimizer("adjust_lr_fn", str),
    "orthogonalize_embeddings": _as_in_optimizer("orthogonalize_embeddings", _bool),
}

# What people reach for here although TrainingArguments has it.
_ELSEWHERE = {"lr": "learning_rate", "learning_rate": "learning_rate", "weight_decay": "weight_decay"}


def options_of(optim: str) -> dict[str, tuple[str, Callable[[str], Any], Callable[[Any], bool]]]:
    """The keys that ``optim_args`` may have for an optimizer name, with what each must be."""
    variant = VARIANTS[optim]
    own = SHAMPOO_OPTIONS if variant.optimizer_cls is MarsShampoo else {}
    return {name: row for name, row in {**OPTIONS, **own}.items() if name not in variant.fixed}


def parse_optim_args(optim_args: str | None, optim: str) -> dict[str, Any]:
    """Read ``"gamma=0.05,max_norm=none,exact=true"``.

    Args:
        optim_args: comma-separated key=value entries; spaces do not matter. None or "" is no entry.
        optim: the optimizer name; it decides which keys there are (:func:`options_of`).

    Returns:
        The given keys with typed values.

    Raises:
        ValueError: an entry is not key=value, a key is unknown or given twice, or a value is malformed or out of
            range. The message names the key, the value, what is allowed and the nearest valid key.
    """
    options = options_of(optim)
    parsed: dict[str, Any] = {}
    if not optim_args or not optim_args.strip():
        return parsed
    for entry in optim_args.split(","):
        key, equals, text = (part.strip() for part in entry.partition("="))
        if not key and not equals:
            raise ValueError(
                f"optim_args={optim_args!r} has an empty entry; write key=value, separated by single commas, "
                f"with keys out of {', '.join(options)}"
            )
        if key not in options:
            raise ValueError(_unknown_key(key, text, optim, options))
        allowed, parse, is_allowed = options[key]
        if not equals:
            raise ValueError(f"optim_args: {key!r} has no value; write {key}=<{allowed}>")
        if key in parsed:
            raise ValueError(f"optim_args: {key!r} is given twice ({parsed[key]!r}, then {text!r}); give it once")
        try:
            value = parse(text)
        except (ValueError, KeyError):
            value = None
            valid = False
        else:
            valid = is_allowed(value)
        if not valid:
            raise ValueError(f"optim_args: {key}={text!r} is not valid; {key} must be {allowed}")
        parsed[key] = value
    return parsed


def _unknown_key(key: str, text: str, optim: str, options: dict[str, Any]) -> str:
    nearest = difflib.get_close_matches(key, options, n=1, cutoff=0.0)[0]
    message = f"optim_args: {key!r} (value {text!r}) is not an option of {optim}; the nearest valid one is {nearest!r}"
    if key in _ELSEWHERE:
        message += f"; set it with TrainingArguments' {_ELSEWHERE[key]} (--{_ELSEWHERE[key]})"
    elif key in VARIANTS[optim].fixed:
        message += f"; {optim} stands for {key}={VARIANTS[optim].fixed[key]}, use mars_shampoo to choose it"
    return f"{message}. Valid: {', '.join(options)}"


# ---- from TrainingArguments to an optimizer ----


def hyperparameters(args: TrainingArguments) -> dict[str, Any]:
    """The optimizer's keyword arguments that ``args`` asks for.

    Betas: optim_args first; else adam_beta1 and adam_beta2 where they are not transformers' defaults (always, in
    MarsTrainingArguments); else MARS's own.

    Raises:
        ValueError: see :func:`parse_optim_args`; or a TrainingArguments field is out of range.
    """
    name = mars_name(args)
    parsed = parse_optim_args(args.optim_args, name)
    betas = (
        parsed.pop("beta1", _beta_of_arguments(args, "adam_beta1")),
        parsed.pop("beta2", _beta_of_arguments(args, "adam_beta2")),
    )
    betas_1d = {i: parsed.pop(f"beta{i}_1d") for i in (1, 2) if f"beta{i}_1d" in parsed}
    if betas_1d:
        parsed["betas_1d"] = (betas_1d.get(1, 0.9), betas_1d.get(2, 0.95))
    kwargs = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, **parsed, **VARIANTS[name].fixed}
    check_hyperparameters(kwargs)
    return kwargs


def _beta_of_arguments(args: TrainingArguments, field: str) -> float:
    value = getattr(args, field)
    if isinstance(args, MarsTrainingArguments) or value != transformers_default(field):
        return value
    return BETA_DEFAULTS[field]


def checked_settings(args: TrainingArguments) -> tuple[type[Mars], dict[str, Any]]:
    """The optimizer class that ``args.optim`` names, and its keyword arguments, which the engine takes too.

    Raises:
        ValueError: see :func:`hyperparameters` and :func:`~hf_mars.trainer.engines.check_engine`.
    """
    optimizer_cls = VARIANTS[mars_name(args)].optimizer_cls
    kwargs = hyperparameters(args)
    check_engine(args, optimizer_cls, kwargs)
    return optimizer_cls, kwargs


def optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None) -> tuple[type[Mars], dict[str, Any]]:
    """What ``Trainer.get_optimizer_cls_and_kwargs`` returns for a MARS name; logs the hyperparameters."""
    optimizer_cls, kwargs = checked_settings(args)
    logger.info(f"{optimizer_cls.__name__}({', '.join(f'{key}={value!r}' for key, value in kwargs.items())})")
    if args.device.type == "cpu" and not is_compiled():
        logger.warning(
            "the compiled step of hf_mars is missing (no C compiler when it was installed, or torch's threads are not "
            "OpenMP's): steps on CPUs are composed of torch's kernels, as right but slower (docs/performance.md)"
        )
    if optimizer_cls is MarsShampoo:
        if model is None:
            raise ValueError(f"optim={mars_name(args)!r} needs the model, to tell embeddings from hidden matrices")
        kwargs["roles"] = parameter_roles(model)
        if args.parallel_mode == ParallelMode.DISTRIBUTED:  # data parallelism; sharded parameters find their own ranks
            kwargs["process_group"] = torch.distributed.group.WORLD
    return optimizer_cls, kwargs
