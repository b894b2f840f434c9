"""MARS's names in transformers: valid values of ``TrainingArguments.optim``, handled by every Trainer."""

from __future__ import annotations

import functools
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from .model_card import register_model_card
from .options import VARIANTS, checked_settings, hyperparameters, mars_name, optimizer_cls_and_kwargs

logger = logging.get_logger(__name__)


def register() -> None:
    """Make ``mars_adamw``, ``mars_lion``, ``mars_shampoo`` and ``mars_m`` optimizer names of transformers.

    ``import hf_mars`` has already called it; calling it again changes nothing. A name that transformers itself has by
    now keeps its enum member, and hf_mars's optimizer replaces transformers' under it, with a warning.
    """
    for name in VARIANTS:
        member = OptimizerNames._value2member_map_.get(name) or _add_member(name)
        handler = _OPTIMIZER_HANDLERS.get(member)
        if handler is not None and handler is not _mars_handler:
            logger.warning(f"optim={name!r} now means hf_mars's optimizer; transformers has one of that name too")
        _OPTIMIZER_HANDLERS[member] = _mars_handler
    if not hasattr(TrainingArguments.__post_init__, "_hf_mars"):
        TrainingArguments.__post_init__ = _checking_first(TrainingArguments.__post_init__)
    register_model_card()


def _mars_handler(ctx: OptimizerContext) -> tuple[Any, dict[str, Any]]:
    """What the stock Trainer, and every subclass of it, calls for a MARS name."""
    optimizer_cls, kwargs = optimizer_cls_and_kwargs(ctx.args, ctx.model)
    if kwargs.get("exact"):
        raise ValueError(
            "optim_args exact=true needs gradients at the previous point, which only hf_mars.MarsTrainer evaluates: "
            "use MarsTrainer, or exact=false"
        )
    return optimizer_cls, kwargs


def _checking_first(post_init):
    """Check optim_args and the engine when TrainingArguments are made, long before a Trainer would.

    No model is loaded in vain; and a DeepSpeed configuration with an optimizer of its own never asks for ours.
    """

    @functools.wraps(post_init)
    def checked(self, *args, **kwargs):
        if mars_name(self) is not None:
            hyperparameters(self)
        post_init(self, *args, **kwargs)
        if mars_name(self) is not None:
            checked_settings(self)  # the engine's configuration is only known by now

    checked._hf_mars = True
    return checked


def _add_member(value: str) -> OptimizerNames:
    """Grow the enum in place: HfArgumentParser's choices, TrainingArguments and the handler table all read it."""
    name = value.upper()
    member = str.__new__(OptimizerNames, value)
    member._name_ = name
    member._value_ = value
    member.__objclass__ = OptimizerNames
    member._sort_order_ = len(OptimizerNames)
    # Enum members are pickled by value, which a process without hf_mars imported refuses to load. Pickled as a call
    # of ours, a saved training_args.bin imports hf_mars by itself.
    member.__reduce_ex__ = functools.partial(_reduce, value)
    type.__setattr__(OptimizerNames, name, member)
    OptimizerNames._member_names_.append(name)
    OptimizerNames._member_map_[name] = member
    OptimizerNames._value2member_map_[value] = member
    if hasattr(OptimizerNames, "_hashable_values_"):  # Python >= 3.13 looks values up here too
        OptimizerNames._hashable_values_.append(value)
    return member


def _reduce(value: str, protocol: int):
    return optimizer_name, (value,)


def optimizer_name(value: str) -> OptimizerNames:
    """The enum member of a name; importing this module has registered it. What pickled arguments call."""
    return OptimizerNames(value)


register()
