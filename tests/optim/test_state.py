"""The state: what is kept of a parameter, saved, loaded, copied, and refused."""

import copy
import io
import pickle

import pytest
import torch
from helpers import (
    CLASSES,
    EVERY_METHOD,
    FEW_SHAPES,
    UPDATE,
    assert_equal,
    assert_same_state,
    factor,
    make,
    make_gradients,
    make_params,
    run_steps,
    values,
)
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

ONE_BUFFER, MARS = {"exp_avg"}, {"exp_avg", "last_grad"}
ADAMW, MARS_ADAMW = {"exp_avg", "exp_avg_sq", "step"}, {"exp_avg", "exp_avg_sq", "step", "last_grad"}
STATES = [
    # method, options, state of a matrix, of an embedding, of a vector
    ("mars_adamw", {}, MARS_ADAMW, MARS_ADAMW, ADAMW),
    ("mars_adamw", {"max_norm": None}, MARS_ADAMW, MARS_ADAMW, ADAMW),
    ("mars_adamw", {"gamma": 0.0}, ADAMW, ADAMW, ADAMW),
    ("mars_adamw", {"optimize_1d": True}, MARS_ADAMW, MARS_ADAMW, MARS_ADAMW),
    ("mars_lion", {}, MARS, MARS, ADAMW),
    ("mars_lion", {"optimize_1d": True}, MARS, MARS, MARS),
    ("mars_lion", {"max_norm": None}, ONE_BUFFER, ONE_BUFFER, ADAMW),
    ("mars_lion", {"gamma": 0.0}, ONE_BUFFER, ONE_BUFFER, ADAMW),
    ("mars_shampoo", {}, MARS, MARS_ADAMW, ADAMW),
    ("mars_shampoo", {"max_norm": None}, ONE_BUFFER, MARS_ADAMW, ADAMW),
    ("mars_shampoo", {"gamma": 0.0}, ONE_BUFFER, ADAMW, ADAMW),
    ("mars_shampoo", {"orthogonalize_embeddings": True}, MARS, MARS, ADAMW),
    ("mars_m", {}, MARS, ADAMW, ADAMW),
    ("mars_m", {"max_norm": None}, ONE_BUFFER, ADAMW, ADAMW),
]
EVERY_STATE = pytest.mark.parametrize("method, options, matrix, embedding, vector", STATES)


def build_of_every_kind(method, options):
    params = make_params([(4, 3), (7, 3), (5,)])
    groups = [{"params": params[:1]}, {"params": params[1:2], "kind": "embedding"}, {"params": params[2:]}]
    return params, make(method, groups, weight_decay=0.1, **options)


@EVERY_STATE
def test_state_keys(method, options, matrix, embedding, vector):
    """The memory that is promised: nothing of a parameter's size is kept beside the named tensors."""
    params, optimizer = build_of_every_kind(method, options)
    run_steps(optimizer, params, make_gradients(params, 3))
    for p, expected in zip(params, (matrix, embedding, vector), strict=True):
        state = optimizer.state[p]
        large = {key for key, value in state.items() if torch.is_tensor(value) and value.numel() > 1}
        assert large == expected - {"step"}
        assert ("step" in state) >= ("step" in expected)
        assert all(state[key].shape == p.shape and state[key].dtype == p.dtype for key in large)


@EVERY_STATE
def test_initialised_by_a_step_of_nothing(method, options, matrix, embedding, vector):
    """torch.distributed.checkpoint fills a fresh optimizer by one step with lr = 0 and zero gradients, then loads."""
    params, optimizer = build_of_every_kind(method, options)
    before = values(params)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    run_steps(optimizer, params, [[torch.zeros_like(p) for p in params]])
    assert_equal(params, before)
    keys = [set(optimizer.state[p]) for p in params]
    assert all(expected <= found for expected, found in zip((matrix, embedding, vector), keys, strict=True))

    trained_params, trained = build_of_every_kind(method, options)
    gradients = make_gradients(params, 20)
    run_steps(trained, trained_params, gradients[:10])
    assert [set(trained.state[p]) for p in trained_params] == keys
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    optimizer.load_state_dict(copy.deepcopy(trained.state_dict()))
    with torch.no_grad():
        for p, q in zip(params, trained_params, strict=True):
            p.copy_(q)
    assert_equal(run_steps(optimizer, params, gradients[10:]), run_steps(trained, trained_params, gradients[10:]))


ROUND_TRIPS = [
    {},
    {"max_norm": None},
    {"max_norm": None, "gamma": 1.0},
    {"gamma": 0.0},
    {"gamma": 0.3, "weight_decay": 0.1, "max_norm": 0.5},
    {"optimize_1d": True},
    {"foreach": False},
    {"fused": True},
    {"betas": (0.9, 0.999), "lr_1d": 1e-4},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", ROUND_TRIPS, ids=str)
@EVERY_METHOD
def test_state_dict_round_trip_mid_run(method, options, dtype):
    """Ten steps, a file, ten steps: bit for bit the twenty steps, with the learning rate where it was."""
    params = make_params(FEW_SHAPES, dtype=dtype)
    gradients = make_gradients(params, 20, scales=(0.01, 0.01, 3.0))
    gradients[4][0] = gradients[12][0] = None
    optimizer = make(method, params, **options)
    run_steps(optimizer, params, gradients[:10], LambdaLR(optimizer, factor))

    file = io.BytesIO()
    torch.save({"params": values(params), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    loaded_params = [nn.Parameter(x) for x in saved["params"]]
    loaded = make(method, loaded_params, **{**options, "lr": 7.0})
    loaded.load_state_dict(saved["optimizer"])
    assert_same_state(loaded, optimizer)

    copied_params, copied = copy.deepcopy((params, optimizer))
    pickled_params, pickled = pickle.loads(pickle.dumps((params, optimizer)))
    assert not any(p is q for p, q in zip(params, copied_params, strict=True))

    expected = run_steps(optimizer, params, gradients[10:])
    assert_equal(run_steps(loaded, loaded_params, gradients[10:]), expected)
    assert_equal(run_steps(copied, copied_params, gradients[10:]), expected)
    assert_equal(run_steps(pickled, pickled_params, gradients[10:]), expected)


@pytest.mark.parametrize("options", [{}, {"max_norm": None}, {"gamma": 0.0}], ids=str)
@pytest.mark.parametrize("saved, loading", [(a, b) for a in CLASSES for b in CLASSES if a is not b])
def test_state_of_another_variant_is_refused(saved, loading, options):
    params = make_params(FEW_SHAPES)
    optimizer = saved(params, **options)
    run_steps(optimizer, params, make_gradients(params, 2))
    with pytest.raises(ValueError, match=UPDATE[saved]):
        loading(params, **options).load_state_dict(optimizer.state_dict())


@EVERY_METHOD
def test_gamma_may_be_set_for_all_groups_of_a_running_optimizer(method):
    """As a schedule of γ does it: 1d parameters, plain AdamW until then, are corrected from then on."""
    params = make_params(FEW_SHAPES)
    optimizer = make(method, params)
    gradients = make_gradients(params, 4)
    run_steps(optimizer, params, gradients[:2])
    for group in optimizer.param_groups:
        group["gamma"] = 0.05
    run_steps(optimizer, params, gradients[2:])
    assert all("last_grad" in state for state in optimizer.state.values())


@pytest.mark.parametrize("method", ["mars_lion", "mars_shampoo"])
def test_a_cleared_state_begins_anew(method):
    """Momentum that is reset by clearing the state: with the settings of now, not the form of before."""
    (param,) = params = make_params([(6, 4)])
    optimizer = make(method, params, max_norm=1.0)
    gradients = make_gradients(params, 2)
    run_steps(optimizer, params, gradients[:1])
    optimizer.state.clear()
    optimizer.param_groups[0]["max_norm"] = None
    run_steps(optimizer, params, gradients[1:])
    assert optimizer.state[param].keys() == ONE_BUFFER
