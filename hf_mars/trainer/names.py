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

# Of MarsTrainingArguments, and thus of run_clm.py.
DEFAULT = "mars_adamw"

# The keys that optim_args may have; options.py has their ranges. Under every name:
COMMON_ARGS = (
    *("gamma", "max_norm", "exact", "beta1", "beta2", "eps", "lr_1d", "beta1_1d", "beta2_1d", "optimize_1d"),
    *("last_grad_dtype", "state_dtype", "kahan_sum", "skip_nonfinite", "foreach", "fused"),
)
# By class, besides:
OWN_ARGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "MarsAdamW": ("adjust_lr_fn",),
        "MarsLion": (),
        "MarsShampoo": ("ns_steps", "adjust_lr_fn", "orthogonalize_embeddings"),
    }
)
# Under any name:
OPTIM_ARGS = tuple(dict.fromkeys((*COMMON_ARGS, *(key for keys in OWN_ARGS.values() for key in keys))))


def keys_of(name: str) -> tuple[str, ...]:
    """The keys that `optim_args` may have under a MARS name."""
    variant = VARIANTS[name]
    return tuple(key for key in (*COMMON_ARGS, *OWN_ARGS[variant.class_name]) if key not in variant.fixed)


def optim_name(args: TrainingArguments) -> str:
    """The optimizer name in `args.optim`, which holds a string at first and a member of `OptimizerNames` later."""
    return str(getattr(args.optim, "value", args.optim))


def mars_name(args: TrainingArguments) -> str | None:
    """The optimizer name in `args.optim` if it is one of MARS's, else None."""
    name = optim_name(args)
    return name if name in VARIANTS else None


def nearest_optimizer(name: str) -> str:
    """In words, that a name is no optimizer's, the nearest of MARS's, and all of those."""
    import difflib  # here: every Python that starts with HF_MARS=1 imports this module

    nearest = difflib.get_close_matches(name.lower(), VARIANTS, n=1, cutoff=0.0)[0]
    return f"there is no such optimizer; the nearest is {nearest}. MARS's are {', '.join(VARIANTS)}"
