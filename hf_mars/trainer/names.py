"""MARS's optimizer names: values of `TrainingArguments.optim` and `--optim`, and the optimizer that each stands for.

Imports the standard library alone, since `import hf_mars` imports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import TrainingArguments

# The environment variable with the file of a run's RunLog; python -m hf_mars.sweep sets it for its runs.
RUN_LOG_VARIABLE = "HF_MARS_SWEEP_LOG"


class Variant(NamedTuple):
    """The optimizer that a name stands for.

    Attributes:
        class_name: its class in `hf_mars.optim`.
        fixed: arguments of the class that the name itself sets; `optim_args` cannot change them.
    """

    class_name: str
    fixed: Mapping[str, Any] = MappingProxyType({})


# The one list of names.
VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "mars_adamw": Variant("MarsAdamW"),
        "mars_lion": Variant("MarsLion"),
        "mars_shampoo": Variant("MarsShampoo"),
        "mars_m": Variant("MarsShampoo", MappingProxyType({"adjust_lr_fn": "match_rms_adamw"})),
    }
)


def optim_name(args: TrainingArguments) -> str:
    """The optimizer name in `args.optim`, which holds a string at first and a member of `OptimizerNames` later."""
    return str(getattr(args.optim, "value", args.optim))


def mars_name(args: TrainingArguments) -> str | None:
    """The optimizer name in `args.optim` if it is one of MARS's, else None."""
    name = optim_name(args)
    return name if name in VARIANTS else None
