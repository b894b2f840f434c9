"""What load_state_dict refuses, and what carries over from torch's AdamW and back."""

import copy

import pytest
import torch
from helpers import EVERY_METHOD, FEW_SHAPES, assert_close, assert_equal, make, make_gradients, make_params, run_steps
from launch_helpers import ROOT

from hf_mars.optim import MarsAdamW, from_adamw, to_adamw


def trained(method="mars_adamw", steps=3):
    params = make_params(FEW_SHAPES, dtype=torch.float32)
    optimizer = make(method, params)
    run_steps(optimizer, params, make_gradients(params, steps))
    return params, optimizer


@EVERY_METHOD
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite(method, value):
    """Lion's sign(NaN) is 0: its parameters would never move again, and nothing would show it."""
    params, optimizer = trained(method)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][0]["exp_avg"][0, 0] = value
    with pytest.raises(ValueError, match="'exp_avg' of parameter 0 is not finite"):
        make(method, params).load_state_dict(state_dict)


@pytest.mark.parametrize(
    "key, value, allowed",
    [("gamma", 1.5, r"in \[0, 1\]"), ("lr", -1.0, ">= 0"), ("betas", (0.9, 1.0), r"\[0, 1\)"), ("max_norm", 0, "> 0")],
)
def test_edited_settings_out_of_range(key, value, allowed):
    params, optimizer = trained()
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][1][key] = value
    with pytest.raises(ValueError, match=f"state_dict: param_group 1: {key} must be .*{allowed}"):
        make("mars_adamw", params).load_state_dict(state_dict)


def test_the_version_of_the_format():
    params, optimizer = trained()
    state_dict = optimizer.state_dict()
    assert state_dict["hf_mars_format"] == 1
    with pytest.raises(ValueError, match="its format is 2, and this version of hf_mars loads 1"):
        make("mars_adamw", params).load_state_dict({**state_dict, "hf_mars_format": 2})


def adamw(params, **settings):
    return torch.optim.AdamW([{"params": params[1:]}, {"params": params[:1]}], lr=0.02, **settings)


def test_from_adamw_and_back():
    """With γ = 0 and no clip MARS-AdamW is AdamW: a run may change from one to the other and back."""
    gradients = make_gradients(make_params(FEW_SHAPES), 9)
    whole = make_params(FEW_SHAPES)
    expected = run_steps(adamw(whole, betas=(0.9, 0.95)), whole, gradients)

    params = make_params(FEW_SHAPES)
    first = adamw(params, betas=(0.9, 0.95))
    run_steps(first, params, gradients[:3])
    order = [p for group in first.param_groups for p in group["params"]]
    plain = {"gamma": 0.0, "max_norm": None, "betas": (0.9, 0.95), "optimize_1d": True, "weight_decay": 0.01}
    second = MarsAdamW(params, lr=0.02, **plain)
    second.load_state_dict(from_adamw(first.state_dict(), order, second))
    run_steps(second, params, gradients[3:6])
    third = adamw(params, betas=(0.9, 0.95))
    third.load_state_dict(to_adamw(second, third))
    assert_close(run_steps(third, params, gradients[6:]), expected, 1e-12)


def example_in_the_docs():
    """The functions of docs/reliability.md."""
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    code = next(block for block in text.split("```python\n")[1:] if "def go_on_with_mars" in block).split("```")[0]
    names: dict = {}
    exec(code, names)
    return names["go_on_with_mars"], names["go_back"]


def test_the_example_in_the_docs_keeps_groups_of_decay():
    go_on_with_mars, go_back = example_in_the_docs()
    params = make_params(FEW_SHAPES)
    frozen = torch.nn.Parameter(torch.ones(3, 3), requires_grad=False)
    decayed = [p for p in [*params, frozen] if p.requires_grad and p.ndim > 1]
    others = [p for p in params if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.3, "lr": 0.02}, {"params": others, "weight_decay": 0.0}]
    first = torch.optim.AdamW([dict(group) for group in groups], lr=0.01, eps=1e-7)
    run_steps(first, params, make_gradients(params, 3))
    averages = {p: first.state[p]["exp_avg"].clone() for p in params}

    mars = go_on_with_mars(first)
    settings = {p: (g["lr"], g["weight_decay"], g["eps"]) for g in mars.param_groups for p in g["params"]}
    assert settings == {p: (0.02, 0.3, 1e-7) if p.ndim > 1 else (0.01, 0.0, 1e-7) for p in params}
    plain = [g for g in mars.param_groups if g["kind"] == "1d"]
    assert [g["betas"] for g in plain] == [(0.9, 0.999)]
    assert_equal([mars.state[p]["exp_avg"] for p in params], [averages[p] for p in params])

    run_steps(mars, params, make_gradients(params, 2))
    second = torch.optim.AdamW(groups, lr=0.01)
    go_back(mars, second)
    assert_equal([second.state[p]["exp_avg"] for p in params], [mars.state[p]["exp_avg"] for p in params])
    assert [g["weight_decay"] for g in second.param_groups] == [0.3, 0.0]


def test_the_first_correction_after_adamw_is_zero():
    params = make_params(FEW_SHAPES)
    first = torch.optim.AdamW(params)
    gradients = make_gradients(params, 4)
    run_steps(first, params, gradients[:3])
    averages = [first.state[p]["exp_avg"].clone() for p in params]
    mars = MarsAdamW(params, gamma=0.5, max_norm=None, betas=(0.9, 0.95))
    mars.load_state_dict(from_adamw(first.state_dict(), params, mars))
    run_steps(mars, params, gradients[3:])
    expected = [0.9 * m + 0.1 * g for m, g in zip(averages, gradients[3], strict=True)]
    assert_close([mars.state[p]["exp_avg"] for p in params], expected, 1e-12)
    matrices = [(p, g) for p, g in zip(params, gradients[3], strict=True) if p.ndim > 1]
    assert_equal([mars.state[p]["last_grad"] for p, _ in matrices], [g for _, g in matrices])


def test_from_adamw_refuses_what_is_not_adamw_s():
    params, optimizer = trained()
    momentum = torch.optim.SGD(params, momentum=0.9)
    run_steps(momentum, params, make_gradients(params, 1))
    with pytest.raises(ValueError, match="and AdamW's has step, exp_avg, exp_avg_sq"):
        from_adamw(momentum.state_dict(), params, optimizer)
    with pytest.raises(ValueError, match="must have the same parameters"):
        from_adamw(torch.optim.AdamW(params[1:]).state_dict(), params[1:], optimizer)
    with pytest.raises(ValueError, match=r"not one of MARS's.*from_adamw"):
        optimizer.load_state_dict(adamw(params).state_dict())
