"""The state of torch's AdamW carried over into MARS-AdamW, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import AdamW

from .variants import MarsAdamW

_SHARED = ("step", "exp_avg", "exp_avg_sq")


def from_adamw(state_dict: dict[str, Any], params: Sequence[Tensor], optimizer: MarsAdamW) -> dict[str, Any]:
    """A state_dict for `optimizer` that goes on from one of `torch.optim.AdamW`.

    m, v and t carry over. There is no g_{t−1} yet, so the first correction is zero (c = g), as at the start of a run.
    The settings are those of `optimizer`.

    Args:
        state_dict: AdamW's.
        params: the parameters in the order in which AdamW had them, all groups in a row.
        optimizer: over the same parameters, in any groups.

    Returns:
        What `optimizer.load_state_dict` takes.

    Raises:
        ValueError: the parameters are not the same, or a state is not AdamW's.
    """
    saved = state_dict["state"]
    index = _positions(params, [p for group in optimizer.param_groups for p in group["params"]], "optimizer")
    states = {}
    for old, state in saved.items():
        if not {*_SHARED} <= state.keys() or "max_exp_avg_sq" in state:
            raise ValueError(f"state_dict: parameter {old} has {sorted(state)}, and AdamW's has {', '.join(_SHARED)}")
        states[index[old]] = {key: state[key] for key in _SHARED}
    return {**optimizer.state_dict(), "state": states}


def to_adamw(optimizer: MarsAdamW, adamw: AdamW) -> dict[str, Any]:
    """A state_dict for `torch.optim.AdamW` that goes on from `optimizer` with m, v and t; g_{t−1} is left out.

    Args:
        optimizer: with a state.
        adamw: over the same parameters, in any groups; its settings are kept.

    Returns:
        What `adamw.load_state_dict` takes.

    Raises:
        ValueError: the parameters are not the same.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    index = _positions(params, [p for group in adamw.param_groups for p in group["params"]], "adamw")
    states = {
        index[i]: {key: optimizer.state[p][key] for key in _SHARED}
        for i, p in enumerate(params)
        if optimizer.state.get(p)
    }
    return {**adamw.state_dict(), "state": states}


def _positions(params: Sequence[Tensor], among: Sequence[Tensor], argument: str) -> dict[int, int]:
    """Where the i-th of `params` is among the parameters of another optimizer."""
    places = {param: place for place, param in enumerate(among)}
    if places.keys() != set(params) or len(params) != len(among):
        raise ValueError(f"{argument} must have the same parameters: {len(among)} of its own, {len(params)} given")
    return {i: places[param] for i, param in enumerate(params)}
