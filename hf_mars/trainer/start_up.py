"""MARS's names in every Python process below one, whatever starts it: a hook in the start of Python.

An installed hf_mars brings `hf_mars.pth`, one line in site-packages (setup.py writes it) that every Python of the
environment executes when it starts. It looks at the environment variable `HF_MARS`, which children inherit, and
imports this module only where it is set. Coverage and tracing tools enter child processes in the same way.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys

from .gloo import rest
from .registry import diagnose_every_trainer

VARIABLE = "HF_MARS"
NAMES, DIAGNOSTICS = "1", "diagnostics"
PTH = "hf_mars.pth"


def start() -> None:
    """Give every Trainer a `MarsDiagnosticsCallback` where `HF_MARS=diagnostics`; the names are registered by now.

    At its end such a process waits for gloo's threads (`hf_mars.trainer.gloo`).

    `hf_mars.pth` calls it where `HF_MARS` is set, and neither empty nor 0. A value that means nothing is reported and
    taken as 1: an error here would end every Python process, package managers included.
    """
    atexit.unregister(rest)
    atexit.register(rest)  # before a script registers any: handlers run from the last to the first
    value = os.environ[VARIABLE]
    if value == DIAGNOSTICS:
        diagnose_every_trainer()
    elif value != NAMES:
        _report(value)


@functools.cache  # in virtual environments Python executes the line twice
def _report(value: str) -> None:
    print(f"hf_mars: {VARIABLE}={value!r} is none of 0, {NAMES} and {DIAGNOSTICS}; taken as {NAMES}", file=sys.stderr)


def prepare(diagnostics: bool) -> None:
    """Register the names, here and in all Python processes that this one starts from now on, and their children.

    Args:
        diagnostics: also give every Trainer a `MarsDiagnosticsCallback`.
    """
    if diagnostics or os.environ.get(VARIABLE) not in (NAMES, DIAGNOSTICS):
        os.environ[VARIABLE] = DIAGNOSTICS if diagnostics else NAMES
    start()


def is_installed() -> bool:
    """Whether the Python processes of this environment have the hook; they have not where hf_mars is not installed."""
    return any(os.path.isfile(os.path.join(folder, PTH)) for folder in sys.path)
