"""`optim_args`: from the user's text to typed, checked arguments of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import ParallelMode
from transformers.utils import logging

from .. import optim
from ..optim import MarsShampoo, parameter_roles
from ..optim.hyperparameters import RANGES, check_hyperparameters
from ..optim.kernels.cpu import is_compiled
from ..optim.mars import Mars
from .arguments import MARS_BETAS, MarsTrainingArguments
from .defaults import mars_default, transformers_default
from .engines import check_engine, check_model
from .names import OPTIM_ARGS, VARIANTS, keys_of, optim_name
from .optim_args import entries, missing_commas

logger = logging.get_logger(__name__)


class Option(NamedTuple):
    """One key of `optim_args`.

    Attributes:
        allowed: the values it may have, in words for error messages.
        parse: reads a value from its text; raises a ValueError or a KeyError where it cannot.
        is_allowed: whether a value that was read is in the range.
    """

    allowed: str
    parse: Callable[[str], Any]
    is_allowed: Callable[[Any], bool]


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


# ---- the options ----

_BETA = Option("a number in [0, 1)", _float, lambda v: 0 <= v < 1)


def _as_in_optimizer(setting: str, parse: Callable[[str], Any]) -> Option:
    """An option with the range that the optimizer's setting has."""
    allowed, is_allowed = RANGES[setting]
    return Option(allowed.replace("True or False", "true or false").replace("None", "none"), parse, is_allowed)


OPTIONS = {
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
    "skip_nonfinite": _as_in_optimizer("skip_nonfinite", _bool),
    "foreach": _as_in_optimizer("foreach", _or_none(_bool)),
    "fused": _as_in_optimizer("fused", _or_none(_bool)),
    "adjust_lr_fn": _as_in_optimizer("adjust_lr_fn", str),
    "ns_steps": _as_in_optimizer("ns_steps", _or_none(int)),
    "orthogonalize_embeddings": _as_in_optimizer("orthogonalize_embeddings", _bool),
}

# transformers' optimizers that read no key of optim_args that MARS has, and drop what they do not read (5.3 to 5.24).
_WITHOUT_ARGS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor", "sgd")


def optimizer_class(name: str) -> type[Mars]:
    """The class that a MARS name stands for."""
    return getattr(optim, VARIANTS[name].class_name)


def options_of(name: str) -> dict[str, Option]:
    """The keys that `optim_args` may have under a MARS name."""
    return {key: OPTIONS[key] for key in keys_of(name)}


def parse_optim_args(optim_args: str | None, name: str) -> dict[str, Any]:
    """Read `"gamma=0.05,max_norm=none,exact=true"`.

    Args:
        optim_args: comma-separated key=value entries; spaces do not matter. None or "" is no entry.
        name: a MARS name; it decides which keys there are (`options_of`).

    Returns:
        The given keys with typed values.

    Raises:
        ValueError: an entry is not key=value, a key is unknown or given twice, or a value is malformed or out of
            range. The message names the key, the value, what is allowed and, of a key, the nearest valid one.
    """
    options = options_of(name)
    parsed: dict[str, Any] = {}
    for key, text in entries(optim_args, name).items():
        allowed, parse, is_allowed = options[key]
        if text is None:
            raise ValueError(f"optim_args: {key!r} has no value; write {key}=<{allowed}>")
        try:
            value = parse(text)
            if not is_allowed(value):
                raise ValueError(text)
        except (ValueError, KeyError):
            raise ValueError(
                f"optim_args: {key}={text!r} is not valid; {key} must be {allowed}{missing_commas(key, text)}"
            ) from None
        parsed[key] = value
    return parsed


def ignored_option(args: TrainingArguments) -> str | None:
    """The first entry of `optim_args` that is an option of MARS and that the optimizer makes no use of; else None.

    Args:
        args: with a name as `optim` that is not MARS's.
    """
    if optim_name(args) not in _WITHOUT_ARGS:
        return None  # other keys are that optimizer's business
    entries = [entry.strip() for entry in str(args.optim_args or "").split(",")]
    return next((entry for entry in entries if entry.partition("=")[0].strip() in OPTIM_ARGS), None)


def text_of(optim_args: Mapping[str, Any]) -> str:
    """The text that a mapping of options stands for; transformers parses that too, before it asks for an optimizer."""
    return ",".join(f"{key}={value}" for key, value in optim_args.items())


# ---- from TrainingArguments to an optimizer ----


def hyperparameters(args: TrainingArguments) -> dict[str, Any]:
    """The optimizer's keyword arguments that `args` asks for.

    Betas: optim_args first; else adam_beta1 and adam_beta2 where they are not transformers' defaults (always, in
    MarsTrainingArguments); else MARS's own.

    Args:
        args: with a MARS name as `optim`.

    Returns:
        "lr", "betas", "eps", every key of `optim_args` and the arguments that the name sets; the others keep the
        constructor's defaults.

    Raises:
        ValueError: see `parse_optim_args`; or a TrainingArguments field is out of range.
    """
    name = optim_name(args)
    parsed = parse_optim_args(args.optim_args, name)
    betas = (
        parsed.pop("beta1", _beta_of_arguments(args, "adam_beta1")),
        parsed.pop("beta2", _beta_of_arguments(args, "adam_beta2")),
    )
    if "beta1_1d" in parsed or "beta2_1d" in parsed:
        beta1_1d, beta2_1d = mars_default("betas_1d")
        parsed["betas_1d"] = (parsed.pop("beta1_1d", beta1_1d), parsed.pop("beta2_1d", beta2_1d))
    allowed, is_allowed = RANGES["lr"]
    if not is_allowed(args.learning_rate):
        raise ValueError(f"learning_rate must be {allowed}, got {args.learning_rate!r}")
    kwargs = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, **parsed, **VARIANTS[name].fixed}
    check_hyperparameters(kwargs)
    return kwargs


def _beta_of_arguments(args: TrainingArguments, field: str) -> float:
    value = getattr(args, field)
    if isinstance(args, MarsTrainingArguments) or value != transformers_default(field):
        return value
    return MARS_BETAS[field]


def checked_settings(args: TrainingArguments) -> tuple[type[Mars], dict[str, Any]]:
    """The optimizer class that `args.optim` names and its keyword arguments, checked against the engine too.

    Args:
        args: with a MARS name as `optim`, after their `__post_init__`, which reads the engines' configurations.

    Returns:
        The class, and its `hyperparameters`.

    Raises:
        ValueError: see `hyperparameters` and `hf_mars.trainer.engines.check_engine`.
    """
    optimizer_cls = optimizer_class(optim_name(args))
    kwargs = hyperparameters(args)
    check_engine(args, kwargs)
    return optimizer_cls, kwargs


def optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None) -> tuple[type[Mars], dict[str, Any]]:
    """The counterpart of `Trainer.get_optimizer_cls_and_kwargs` for MARS names.

    Args:
        args: see `checked_settings`.
        model: the model to train; MarsShampoo alone needs it.

    Returns:
        The class and all its keyword arguments; MarsShampoo's include "roles" and, under data parallelism,
        "process_group".

    Raises:
        ValueError: see `checked_settings` and `engines.check_model`; or MarsShampoo is not given the model.
    """
    optimizer_cls, kwargs = checked_settings(args)
    if model is not None:
        check_model(args, model)
    if args.device.type == "cpu" and not is_compiled():
        logger.warning(
            f"the compiled step of hf_mars is missing ({_why_not_compiled()}): steps on CPUs are composed of torch's "
            "kernels, as right but slower (docs/performance.md)"
        )
    if optimizer_cls is MarsShampoo:
        if model is None:
            raise ValueError(f"optim={optim_name(args)!r} needs the model, to tell embeddings from hidden matrices")
        if getattr(model, "name_or_path", "") and all(param.requires_grad for param in model.parameters()):
            logger.warning_once(
                f"optim={optim_name(args)!r} tunes all weights of a pretrained model: if Adam pretrained it, such "
                "updates can degrade it (docs/guide.md); mars_adamw is the safe choice, and hf_mars.sweep tells"
            )
        kwargs["roles"] = parameter_roles(model)
        if args.parallel_mode == ParallelMode.DISTRIBUTED:  # data parallelism; sharded parameters find their own ranks
            kwargs["process_group"] = torch.distributed.group.WORLD
    return optimizer_cls, kwargs


def _why_not_compiled() -> str:
    """A checkout in the folder that is started from hides an installed package, which may have the compiled step."""
    ours = Path(optim.__file__).resolve().parents[1]
    try:
        installed = Path(str(distribution("hf_mars").locate_file("hf_mars"))).resolve()
    except PackageNotFoundError:
        return f"{ours} is not installed; pip install -e there compiles it"
    if installed != ours and installed.is_dir():
        return f"{ours} hides the installed {installed}: use python -m hf_mars.clm elsewhere, or pip install -e here"
    return "no C compiler when it was installed, or torch's threads are not OpenMP's"
