"""The state of a parameter: its keys and dtypes, making it at the first gradient, and loading it.

Keys: "exp_avg" (m; e in the one-tensor form), "exp_avg_sq" (v) and "step" (t) for AdamW, "last_grad" or "last_param"
as the form says, "compensation" with Kahan summation. All but "step" have the parameter's shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .algorithm.correction import initial_average
from .form import Form, form_of_a_loaded_state, form_of_settings
from .groups import Group, check_not_flattened
from .hyperparameters import check_hyperparameters, dtype_of
from .last_grad import keep
from .precision import AVERAGES, dtype_of_squares, needs_compensation
from .sharding import part_of
from .skipping import Skip

State = dict[str, Any]
Made = tuple[Tensor, frozenset[str]]  # a parameter, and the keys of its state before something was added


def state_keys(dtype: torch.dtype, group: Group, form: Form) -> set[str]:
    """The keys in the state of a parameter of `dtype`, after its first step."""
    keys = {"exp_avg"}
    if group["update"] == "adamw":
        keys |= {"step", "exp_avg_sq"}
    if form is Form.APPROX:
        keys.add("last_grad")
    if form is Form.EXACT:
        keys.add("last_param")  # which comes with the first step, not with the state
    if needs_compensation(dtype, group):
        keys.add("compensation")
    return keys


def state_dtype(key: str, param: Tensor, group: Group) -> torch.dtype:
    """The dtype that `group` wants a state of `param` in."""
    setting = {"last_grad": "last_grad_dtype", "exp_avg": "state_dtype", "exp_avg_sq": "state_dtype"}.get(key)
    wanted = dtype_of(group[setting]) if setting else None
    return wanted or (dtype_of_squares(param.dtype) if key == "exp_avg_sq" else param.dtype)


def decide_form(group: Group, state: Mapping[Tensor, State], forms: Mapping[Tensor, Form]) -> Form:
    """The form of a group's states: the one that its settings ask for.

    But a group that began with g_{t−1} goes on with it where one tensor would do by now (max_norm was set to None
    later).

    Args:
        group: a param_group.
        state: the optimizer's.
        forms: of each parameter whose state was made here; that of others, a checkpoint's, is recognised.
    """
    form = form_of_settings(group)
    if form is Form.ONE_TENSOR:
        for param in group["params"]:
            own = state.get(param)
            if own and (forms.get(param) or form_of_a_loaded_state(own)) is Form.APPROX:
                return Form.APPROX
    return form


def make_state(param: Tensor, state: State, group: Group, form: Form, factor: float | Tensor | None = None) -> None:
    """Bring the state of a parameter into a form: at its first gradient, and where settings have changed since.

    The same keys on every rank, also for an empty shard: checkpoints of shards drop a key that one rank lacks.

    Args:
        param: as the group has it, with a gradient.
        state: of the parameter, empty at its first gradient. Modified.
        group: its param_group.
        form: the form to have.
        factor: f of the global clip, by which g_t is the gradient's multiple; None: 1.
    """

    def zeros(key: str) -> Tensor:
        return torch.zeros_like(param, dtype=state_dtype(key, param, group), memory_format=torch.preserve_format)

    def first_grad() -> Tensor:
        assert param.grad is not None
        grad = local(param.grad)
        return grad if factor is None else grad * factor

    local = part_of(param).of
    if "exp_avg" not in state:
        check_not_flattened(param)  # by an engine that wraps the model after the optimizer is made
        if group["update"] == "adamw":
            # Where torch's AdamW keeps it: a fused kernel reads it on the device, the others on the host.
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device if group["fused"] else "cpu")
            state["exp_avg_sq"] = zeros("exp_avg_sq")
        state["exp_avg"] = zeros("exp_avg")
        if form is Form.ONE_TENSOR:
            local(state["exp_avg"]).copy_(initial_average(first_grad(), group["gamma"]))
    # A tensor that this form does not keep up to date must not be there when the settings change back.
    if form is not Form.EXACT:
        state.pop("last_param", None)
    if form is not Form.APPROX:
        state.pop("last_grad", None)
    elif "last_grad" not in state:
        # The paper's x_1 = x_0: no difference yet, so c_1 = g_1.
        state["last_grad"] = zeros("last_grad")
        keep([local(state["last_grad"])], [first_grad()], None)
    if not needs_compensation(param.dtype, group):
        state.pop("compensation", None)
    elif "compensation" not in state:
        state["compensation"] = zeros("compensation")


def unmake_states(made: list[Made], state: dict[Tensor, State], forms: dict[Tensor, Form]) -> None:
    """Take back what `make_state` has added for a step that changes nothing."""
    for param, keys in made:
        forms.pop(param, None)
        if keys:
            state[param] = {key: value for key, value in state[param].items() if key in keys}
        else:
            del state[param]


def begin_with_zero(made: list[Made], state: Mapping[Tensor, State], skip: Skip) -> None:
    """Where only the device knows that a step changes nothing: let new states begin as if g_t were zero.

    g_t is in them, as the first gradient. With zero, the first correction after it is that of g_0 = 0.
    """
    for param, keys in made:
        flag = skip.flag(param.device)
        for key in {"last_grad", "exp_avg"} - keys:
            if flag is not None and key in state[param]:
                own = part_of(param).of(state[param][key])
                own.copy_(torch.where(flag > 0, torch.zeros_like(own), own))


# Of state dicts, under this key beside "state" and "param_groups"; checkpoints of 0.1.0 and of engines have none.
FORMAT_KEY = "hf_mars_format"
FORMAT = 1


def check_state_dict(state_dict: dict[str, Any], groups: list[Group], optimizer: str) -> None:
    """Refuse a state_dict that does not belong to `groups` of the class `optimizer`.

    Raises:
        ValueError: it is of a later format, of another MARS variant or of no MARS optimizer; a setting in it is out of
            range; or a moving average or gradient in it is not finite.
    """
    if (found := state_dict.get(FORMAT_KEY, FORMAT)) != FORMAT:
        raise ValueError(f"state_dict: its format is {found!r}, and this version of hf_mars loads {FORMAT}")
    _check_groups(state_dict["param_groups"], groups, optimizer)
    _check_finite(state_dict)


def _check_finite(state_dict: dict[str, Any]) -> None:
    for index, state in state_dict["state"].items():
        for key, value in state.items():
            if (
                torch.is_tensor(value)
                and value.device.type != "meta"
                and not part_of(value).of(value).isfinite().all()
            ):
                raise ValueError(
                    f"state_dict: {key!r} of parameter {index} is not finite, and would stay so in every later step; "
                    "go on from an earlier checkpoint"
                )


def _check_groups(saved_groups: list[Group], groups: list[Group], optimizer: str) -> None:
    if saved_groups and not any("update" in saved for saved in saved_groups):
        raise ValueError(
            f"state_dict: was saved by an optimizer that is not one of MARS's, and {optimizer} cannot go on from it; "
            "start a new run from its weights, or, in a loop of your own, convert AdamW's with "
            "hf_mars.optim.from_adamw"
        )
    if len(saved_groups) != len(groups):
        return  # torch says so
    for i, (saved, own) in enumerate(zip(saved_groups, groups, strict=True)):
        try:
            check_hyperparameters(saved)
        except ValueError as error:
            raise ValueError(f"state_dict: param_group {i}: {error}") from None
        if saved.get("update") != own["update"]:
            raise ValueError(
                f"state_dict: param_group {i} was saved with update={saved.get('update')!r}, but {optimizer} has "
                f"{own['update']!r} there; load it into the optimizer it came from"
            )


def convert_states(groups: list[Group], state: Mapping[Tensor, State]) -> None:
    """Bring states to the dtypes, and counts to the devices, that their groups' settings ask for by now."""
    for group in groups:
        for param in group["params"]:
            own = state.get(param, {})
            for key in (*AVERAGES, "last_grad"):
                if key in own:
                    own[key] = own[key].to(state_dtype(key, param, group))
            if "step" in own:
                own["step"] = own["step"].to(param.device if group["fused"] else "cpu")


def load_dtypes(state_dict: dict[str, Any], groups: list[Group], state: Mapping[Tensor, State]) -> None:
    """Undo torch's rounding of every loaded state to the parameter's dtype, where a group's settings say otherwise."""
    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    own = [(param, group) for group in groups for param in group["params"]]
    for i, (param, group) in zip(saved_ids, own, strict=True):
        for key in (*AVERAGES, "last_grad"):
            saved = state_dict["state"].get(i, {}).get(key)
            dtype = state_dtype(key, param, group)
            if saved is not None and state[param][key].dtype != dtype:
                state[param][key] = saved.to(param.device, dtype, copy=True)
