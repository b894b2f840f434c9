"""The four forms of MARS: what c_t is corrected with, and what a parameter's state keeps for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any

from .algorithm.correction import kappa


class Form(Enum):
    """Decided when a parameter's state is made, and again only where its group's settings ask for another one.

    A form is about the correction alone. Which update follows, who executes it and where the parameter lies do not
    depend on it.
    """

    PLAIN = "plain"
    """κ = 0: c_t = g_t. Keeps nothing."""
    APPROX = "approx"
    """c_t = g_t + κ (g_t − g_{t−1}). Keeps "last_grad", g_{t−1}."""
    ONE_TENSOR = "one_tensor"
    """The same where m_t is linear in the gradients, as one moving average of plain gradients. Keeps nothing else."""
    EXACT = "exact"
    """c_t = g_t + κ (g_t − ∇f(x_{t−1}, ξ_t)). Keeps "last_param", x_{t−1}."""


def kappa_of(group: Mapping[str, Any]) -> float:
    """κ of a param_group."""
    return kappa(group["gamma"], group["betas"][0])


def form_of_settings(group: Mapping[str, Any]) -> Form:
    """The form that the settings of a param_group ask for."""
    if group["exact"]:
        return Form.EXACT
    if kappa_of(group) == 0:
        return Form.PLAIN
    # AdamW squares c_t and a clip divides it: not linear. With γ = 1 the average's start, e_0, would be infinite.
    if group["update"] != "adamw" and group["max_norm"] is None and group["gamma"] < 1:
        return Form.ONE_TENSOR
    return Form.APPROX


def form_of_a_loaded_state(keys: Collection[str]) -> Form | None:
    """The form of a state that a checkpoint or an engine made; None if there is none. PLAIN may be ONE_TENSOR, which
    keeps the same.
    """
    if "exp_avg" not in keys:
        return None
    if "last_param" in keys:
        return Form.EXACT
    return Form.APPROX if "last_grad" in keys else Form.PLAIN
