"""The text of `optim_args`: its entries, and the mistakes in it that show before any value is read.

Imports the standard library alone: run_clm.py tells of them before torch and transformers are imported.
"""

from __future__ import annotations

import difflib

from .names import VARIANTS, keys_of

# Keys that people try here, and the TrainingArguments that have them.
_ELSEWHERE = {
    "lr": "learning_rate",
    **{field: field for field in ("learning_rate", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2")},
}


def entries(optim_args: str | None, name: str) -> dict[str, str | None]:
    """The keys of `optim_args` and the texts of their values; None for a key without "=".

    Args:
        optim_args: see `options.parse_optim_args`.
        name: a MARS name; it decides which keys there are.

    Raises:
        ValueError: an entry is not key=value, or a key is unknown or given twice.
    """
    found: dict[str, str | None] = {}
    if not optim_args or not optim_args.strip():
        return found
    keys = keys_of(name)
    for entry in optim_args.split(","):
        key, equals, text = (part.strip() for part in entry.partition("="))
        if not key and not equals:
            raise ValueError(
                f"optim_args={optim_args!r} has an empty entry; write key=value, separated by single commas, "
                f"with keys out of {', '.join(keys)}"
            )
        if not equals and ":" in key:
            raise ValueError(f"optim_args: {key!r} is not key=value; write {'='.join(key.split(':', 1))}")
        if key not in keys:
            raise ValueError(_unknown_key(key, text, name, keys))
        if key in found:
            raise ValueError(f"optim_args: {key!r} is given twice ({found[key]!r}, then {text!r}); give it once")
        found[key] = text if equals else None
    return found


def _unknown_key(key: str, text: str, name: str, keys: tuple[str, ...]) -> str:
    message = f"optim_args: {key!r} (value {text!r}) is not an option of {name}"
    others = [other for other in VARIANTS if key in keys_of(other)]
    if key in _ELSEWHERE:
        message += f"; set it with TrainingArguments' {_ELSEWHERE[key]} (--{_ELSEWHERE[key]})"
    elif key == "betas":
        message += "; write beta1=…,beta2=…"
    elif key in VARIANTS[name].fixed:
        message += f"; {name} stands for {key}={VARIANTS[name].fixed[key]}, use mars_shampoo to choose it"
    elif others:
        message += f"; {' and '.join(others)} {'have' if len(others) > 1 else 'has'} it"
    elif nearest := difflib.get_close_matches(key.lower(), keys, n=1):
        message += f"; the nearest valid one is {nearest[0]!r}"
    return f"{message}{missing_commas(key, text)}. Valid: {', '.join(keys)}"


def missing_commas(key: str, text: str) -> str:
    """How to write entries that something else than commas separates; "" where there is one alone."""
    if "=" not in text:
        return ""
    return f"; commas separate entries: {','.join(f'{key}={text}'.replace(';', ' ').split())}"
