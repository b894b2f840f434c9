"""Makes MARS's names valid values of `TrainingArguments.optim` that every Trainer can use, by changing transformers.

Five modules of transformers are changed, each when a script imports it (`on_import`): `import hf_mars` alone imports
neither transformers nor torch. Functions that are put into them import the rest of this package when they are called.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .hooks import add_to_callbacks, add_to_trainer
from .names import VARIANTS, mars_name, nearest_optimizer, optim_name
from .on_import import when_imported, wrap_once
from .versions import check_transformers

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import CallbackHandler
    from transformers.trainer_optimizer import OptimizerContext
    from transformers.training_args import OptimizerNames

logger = logging.getLogger(__name__)


def register() -> None:
    """Make `mars_adamw`, `mars_lion`, `mars_shampoo` and `mars_m` optimizer names of transformers.

    `import hf_mars` has already called it; calling it again changes nothing. If transformers is not imported yet,
    the names are there as soon as it is. A name that transformers itself has by now keeps its enum member, and
    hf_mars's optimizer replaces transformers' under it, with a warning.

    Raises:
        ImportError: the installed transformers is not supported; here, or where transformers is imported later.
    """
    when_imported("transformers.training_args", _add_names)
    when_imported("transformers.trainer_optimizer", _add_handlers)
    when_imported("transformers.modelcard", _describe_in_cards)
    when_imported("transformers.trainer", add_to_trainer)
    when_imported("transformers.trainer_callback", add_to_callbacks)


def diagnose_every_trainer() -> None:
    """Give each Trainer made from now on a `MarsDiagnosticsCallback`, before its reporters."""
    when_imported("transformers.trainer", _add_diagnostics)


def log_every_trainer() -> None:
    """Give each Trainer made from now on a `RunLog`, after the callbacks that it is made with."""
    when_imported("transformers.trainer_callback", _add_run_log)


# ---- transformers.training_args: the names, and checks as early as possible ----


def _add_names(training_args: ModuleType) -> None:
    check_transformers()
    for name in VARIANTS:
        if name not in training_args.OptimizerNames._value2member_map_:
            _add_member(training_args.OptimizerNames, name)
    wrap_once(training_args.TrainingArguments, "__post_init__", _with_checks)


def _with_checks(post_init: Callable[..., None]) -> Callable[..., None]:
    """Check optim_args and the engine when TrainingArguments are made, long before a Trainer would.

    No model is loaded in vain; and a DeepSpeed configuration with an optimizer of its own never asks for ours.
    """

    def post_init_with_checks(self: TrainingArguments, *args: Any, **kwargs: Any) -> None:
        name = optim_name(self)
        if mars_name(self) is not None:
            from .options import hyperparameters, text_of

            if isinstance(self.optim_args, Mapping):
                self.optim_args = text_of(self.optim_args)
            hyperparameters(self)
        elif "mars" in name.lower():
            raise ValueError(f"optim={name!r}: {nearest_optimizer(name)}")
        elif self.optim_args:
            _check_not_ignored(self)
        post_init(self, *args, **kwargs)
        if mars_name(self) is not None:
            from .options import checked_settings

            checked_settings(self)  # the engine's configuration is only known by now

    return post_init_with_checks


def _check_not_ignored(args: TrainingArguments) -> None:
    """Options of MARS beside an optimizer that drops them: an error in our own arguments, a warning in others'."""
    from .arguments import MarsTrainingArguments
    from .options import ignored_option

    ignored = ignored_option(args)
    if ignored is not None:
        message = f"optim_args: {ignored!r} is for MARS, and optim={optim_name(args)!r} makes no use of it"
        if isinstance(args, MarsTrainingArguments):
            raise ValueError(f"{message}; choose one of {', '.join(VARIANTS)}, or leave it out")
        logger.warning(message)


def _add_member(enum: type[OptimizerNames], value: str) -> None:
    """Grow the enum in place: HfArgumentParser's choices, TrainingArguments and the handler table all read it."""
    name = value.upper()
    member = str.__new__(enum, value)
    vars(member).update(
        _name_=name,
        _value_=value,
        __objclass__=enum,
        _sort_order_=len(enum),
        # Enum members are pickled by value, which a process without hf_mars imported refuses to load. Pickled as a
        # call of ours, a saved training_args.bin imports hf_mars by itself.
        __reduce_ex__=functools.partial(_reduce, value),
    )
    type.__setattr__(enum, name, member)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[value] = member
    if hasattr(enum, "_hashable_values_"):  # Python >= 3.13 looks values up here too
        enum._hashable_values_.append(value)


def _reduce(value: str, protocol: int) -> tuple[Callable[[str], OptimizerNames], tuple[str]]:
    return optimizer_name, (value,)


def optimizer_name(value: str) -> OptimizerNames:
    """The enum member of a name. Pickled TrainingArguments name this function, which must stay here for their sake.

    Args:
        value: any optimizer name; importing hf_mars has registered MARS's.

    Raises:
        ValueError: there is no such name.
    """
    from transformers.training_args import OptimizerNames

    return OptimizerNames(value)


# ---- transformers.trainer_optimizer: from a name to an optimizer ----


def _add_handlers(trainer_optimizer: ModuleType) -> None:
    handlers = trainer_optimizer._OPTIMIZER_HANDLERS
    for name in VARIANTS:
        member = trainer_optimizer.OptimizerNames(name)
        if handlers.get(member, _mars_handler) is not _mars_handler:
            logger.warning(f"optim={name!r} now means hf_mars's optimizer; transformers has one of that name too")
        handlers[member] = _mars_handler


def _mars_handler(context: OptimizerContext) -> tuple[Any, dict[str, Any]]:
    """Called for a MARS name by the stock Trainer and every subclass of it, MarsTrainer excepted."""
    from .options import optimizer_cls_and_kwargs

    optimizer_cls, kwargs = optimizer_cls_and_kwargs(context.args, context.model)
    if kwargs.get("exact"):
        raise ValueError(
            "optim_args exact=true needs gradients at the previous point, which only hf_mars.MarsTrainer evaluates: "
            "use MarsTrainer, or exact=false"
        )
    return optimizer_cls, kwargs


# ---- transformers.modelcard: the optimizer in model cards ----


def _describe_in_cards(modelcard: ModuleType) -> None:
    wrap_once(modelcard, "extract_hyperparameters_from_trainer", _with_mars)


def _with_mars(extract: Callable[[Trainer], dict[str, Any]]) -> Callable[[Trainer], dict[str, Any]]:
    """Model cards tell the truth about MARS: transformers' print `args.adam_beta1` for any "adam"."""

    def extract_with_mars(trainer: Trainer) -> dict[str, Any]:
        from .model_card import describe_optimizer_of

        description = describe_optimizer_of(trainer)
        return extract(trainer) | ({} if description is None else {"optimizer": description})

    return extract_with_mars


# ---- transformers.trainer: diagnostics in every Trainer, where they are asked for ----


def _add_diagnostics(trainer: ModuleType) -> None:
    from .callbacks import MarsDiagnosticsCallback

    if MarsDiagnosticsCallback not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(MarsDiagnosticsCallback)


# ---- transformers.trainer_callback: the log of a run, where python -m hf_mars.sweep asks for it ----


def _add_run_log(trainer_callback: ModuleType) -> None:
    wrap_once(trainer_callback.CallbackHandler, "__init__", _with_run_log)


def _with_run_log(init: Callable[..., None]) -> Callable[..., None]:
    def init_with_run_log(self: CallbackHandler, *args: Any, **kwargs: Any) -> None:
        from .run_log import RunLog

        init(self, *args, **kwargs)
        self.add_callback(RunLog)

    return init_with_run_log
