"""What the optimizers promise beside the mathematics: groups, state, errors, and their manners as torch optimizers."""

import ast
import copy
import io
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import METHODS, assert_close, assert_equal, factor, make_gradients, make_params, run_steps, values
from reference import references
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from hf_mars.optim import MarsAdamW, MarsLion, MarsShampoo, parameter_roles

OPTIM = Path(sys.modules["hf_mars.optim"].__file__).parent
CLASSES = [MarsAdamW, MarsLion, MarsShampoo]
EVERY_CLASS = pytest.mark.parametrize("cls", CLASSES)
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
UPDATE = {MarsAdamW: "adamw", MarsLion: "lion", MarsShampoo: "shampoo"}
SHAPES = [(4, 3), (3, 5), (6,), ()]


def make(method, params, lr=0.02, **options):
    cls, keywords, _ = METHODS[method]
    return cls(params, lr=lr, **keywords, **options)


def group_of(optimizer, param):
    (group,) = (g for g in optimizer.param_groups if any(p is param for p in g["params"]))
    return group


def kinds(optimizer):
    return [group["kind"] for group in optimizer.param_groups]


# --- Groups


@EVERY_CLASS
def test_hyperparameters_live_in_the_groups(cls):
    keys = {"lr", "betas", "eps", "weight_decay", "gamma", "max_norm", "exact", "foreach", "fused", "kind", "update"}
    if cls is MarsShampoo:
        keys |= {"ns_steps", "adjust_lr_fn"}
    optimizer = cls(make_params([(3, 4), (5,)]))
    for group in optimizer.param_groups:
        assert keys <= group.keys()
    matrix = optimizer.param_groups[0]
    defaults = {"lr": 3e-3, "betas": (0.95, 0.99), "eps": 1e-8, "weight_decay": 0.0, "gamma": 0.025, "max_norm": 1.0}
    assert {key: matrix[key] for key in defaults} == defaults
    assert matrix["exact"] is False
    if cls is MarsShampoo:
        assert (matrix["ns_steps"], matrix["adjust_lr_fn"]) == (5, "original")


# One row is what the second of two groups states for itself in the constructor, or is set to after ten steps.
CHANGES = [
    {"gamma": 0.3},
    {"gamma": 0.0},
    {"max_norm": 0.2},
    {"max_norm": None},
    {"max_norm": 1e9},
    {"lr": 0.2},
    {"lr": 0.0},
    {"betas": (0.8, 0.9)},
    {"weight_decay": 0.5},
    {"eps": 1e-2},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
@EVERY_METHOD
def test_a_group_states_its_own(method, change):
    _, keywords, variant = METHODS[method]
    first, second = make_params([(4, 3), (3, 4)]), make_params([(5, 4), (2, 6)], seed=5)
    common = {"weight_decay": 0.1, "gamma": 0.1}
    optimizer = make(method, [{"params": first}, {"params": second, **change}], **common)
    common |= {"lr": 0.02, **keywords}
    refs = references(variant, first, **common) + references(variant, second, **{**common, **change})
    check_follows(optimizer, first + second, refs)


@pytest.mark.parametrize("change", CHANGES, ids=str)
@EVERY_METHOD
def test_a_change_takes_effect_mid_run(method, change):
    _, keywords, variant = METHODS[method]
    params = make_params([(4, 3), (3, 4)])
    optimizer = make(method, params, gamma=0.1)
    refs = references(variant, params, lr=0.02, gamma=0.1, **keywords)
    check_follows(optimizer, params, refs, seed=1)
    before = values(params)
    optimizer.param_groups[0].update(change)
    attributes = {"lr": "eta", "weight_decay": "lam"}
    for ref in refs:
        for name, value in change.items():
            if name == "betas":
                ref.beta1, ref.beta2 = value
            else:
                setattr(ref, attributes.get(name, name), value)
    check_follows(optimizer, params, refs, seed=2)
    if change == {"lr": 0.0}:
        assert_equal(params, before)


@EVERY_METHOD
def test_gamma_may_come_and_go(method):
    """With gamma = 0 no gradient is remembered; when gamma returns there is no g_{t-1} yet, and c_t = g_t."""
    _, keywords, variant = METHODS[method]
    params = make_params([(4, 3), (3, 4)])
    optimizer = make(method, params, gamma=0.3)
    refs = references(variant, params, lr=0.02, gamma=0.3, **keywords)
    for seed, gamma in enumerate([0.3, 0.0, 0.3, 0.0, 0.1]):
        optimizer.param_groups[0]["gamma"] = gamma
        for ref in refs:
            if ref.gamma == 0:
                ref.g_prev = None
            ref.gamma = gamma
        check_follows(optimizer, params, refs, seed=seed)


def check_follows(optimizer, params, refs, seed=1):
    gradients = make_gradients(params, 10, scales=(0.01, 0.01, 2.0), seed=seed)
    for step in gradients:
        for ref, g in zip(refs, step, strict=True):
            ref.step(g)
    assert_close(run_steps(optimizer, params, gradients), [ref.x for ref in refs], 1e-12)


@EVERY_CLASS
def test_groups_are_split_into_matrices_and_1d(cls):
    w, b, scalar, other_w, other_b = make_params([(3, 4), (5,), (), (2, 3, 4), (7,)])
    optimizer = cls(
        [
            {"params": [b, w, scalar], "weight_decay": 0.1},
            {"params": [other_w, other_b], "weight_decay": 0.0, "lr": 0.5, "gamma": 0.3, "note": "mine"},
        ],
        lr=0.2,
        betas=(0.9, 0.98),
        betas_1d=(0.7, 0.8),
        max_norm=2.0,
    )
    first, first_1d, second, second_1d = optimizer.param_groups
    for group, params, wanted in [
        (first, [w], {"kind": "matrix", "lr": 0.2, "weight_decay": 0.1, "gamma": 0.025, "update": UPDATE[cls]}),
        (first_1d, [b, scalar], {"kind": "1d", "lr": 0.1, "weight_decay": 0.1}),
        (second, [other_w], {"kind": "matrix", "lr": 0.5, "weight_decay": 0.0, "gamma": 0.3, "note": "mine"}),
        (second_1d, [other_b], {"kind": "1d", "lr": 0.25, "weight_decay": 0.0, "note": "mine"}),
    ]:
        assert len(group["params"]) == len(params)
        assert all(p is q for p, q in zip(group["params"], params, strict=True))
        assert {key: group[key] for key in wanted} == wanted
        if group["kind"] == "matrix":
            assert (group["betas"], group["max_norm"]) == ((0.9, 0.98), 2.0)
        else:
            plain_adamw = {"betas": (0.7, 0.8), "gamma": 0.0, "max_norm": None, "update": "adamw"}
            assert {key: group[key] for key in plain_adamw} == plain_adamw


@EVERY_CLASS
def test_lr_1d(cls):
    def rates(groups, **options):
        return [group["lr"] for group in cls(groups, **options).param_groups]

    assert rates(make_params([(3, 4), (5,)]), lr=0.2) == [0.2, 0.1]
    assert rates(make_params([(3, 4), (5,)]), lr=0.2, lr_1d=0.7) == [0.2, 0.7]
    assert rates(make_params([(3, 4), (5,)]), lr=0.2, lr_1d=0.0) == [0.2, 0.0]
    assert rates(make_params([(3, 4), (5,)]), lr=0.0) == [0.0, 0.0]
    assert rates(make_params([(3, 4), (5,)]), lr=0.0, lr_1d=0.3) == [0.0, 0.3]
    groups = [{"params": make_params([(3, 4), (5,)]), "lr": 0.4}, {"params": make_params([(3, 4), (5,)])}]
    assert rates(groups, lr=0.2, lr_1d=0.7) == [0.4, 0.7, 0.2, 0.7]
    groups = [{"params": make_params([(3, 4), (5,)]), "lr_1d": 0.4}, {"params": make_params([(3, 4), (5,)])}]
    assert rates(groups, lr=0.2) == [0.2, 0.4, 0.2, 0.1]


@EVERY_METHOD
def test_lr_zero(method):
    params = make_params(SHAPES)
    before = values(params)
    assert_equal(run_steps(make(method, params, lr=0.0, weight_decay=0.1), params, make_gradients(params, 3)), before)


@pytest.mark.parametrize("cls", [MarsAdamW, MarsLion])
def test_optimize_1d_gives_every_parameter_the_same(cls):
    groups = cls(make_params(SHAPES), lr=0.2, optimize_1d=True).param_groups
    assert [group["kind"] for group in groups] == ["matrix", "1d"]
    for group in groups:
        assert (group["lr"], group["betas"], group["update"]) == (0.2, (0.95, 0.99), UPDATE[cls])
        assert (group["gamma"], group["max_norm"]) == (0.025, 1.0)


@EVERY_METHOD
@pytest.mark.parametrize("kind, shape", [("matrix", (4, 3)), ("embedding", (4, 3)), ("1d", (4, 3)), ("1d", (4,))])
@pytest.mark.parametrize("lr_1d", [None, 0.5])
def test_a_group_states_its_kind(method, kind, shape, lr_1d):
    """The kind decides, not the shape: engines flatten and shard parameters behind the optimizer's back."""
    _, keywords, variant = METHODS[method]
    params = make_params([shape])
    optimizer = make(method, [{"params": params, "kind": kind}], lr_1d=lr_1d, weight_decay=0.1)
    assert kinds(optimizer) == [kind]
    refs = references(variant, params, lr=0.02, lr_1d=lr_1d, weight_decay=0.1, kind=kind, **keywords)
    check_follows(optimizer, params, refs)


@pytest.mark.parametrize("cls", [MarsAdamW, MarsLion])
def test_a_flat_shard_of_a_matrix_is_a_matrix(cls):
    params = make_params([(12,)])
    optimizer = cls([{"params": params, "kind": "matrix"}], lr=0.02, max_norm=None)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["gamma"]) == (0.02, 0.025)
    check_follows(optimizer, params, references(UPDATE[cls], params, lr=0.02, kind="matrix", max_norm=None))


@EVERY_METHOD
def test_what_needs_whole_matrices_refuses_flat_slices(method):
    """DeepSpeed flattens groups after the optimizer was made; the norm of a slice is no matrix's norm."""
    params = make_params([(3, 4)])
    optimizer = make(method, params)
    flat = torch.nn.Parameter(params[0].detach().flatten())
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones_like(flat)
    with pytest.raises(RuntimeError, match=r"flat slice of shape \(12,\).*FSDP2"):
        optimizer.step()
    assert torch.equal(flat, params[0].flatten())


def test_parameters_that_zero_3_has_emptied_are_what_they_were():
    """deepspeed.zero.Init leaves (0,) of every parameter and notes the shape."""
    model = nn.Sequential(nn.Linear(3, 4))
    for param in model.parameters():
        param.ds_shape = param.shape
        param.data = torch.empty(0)
    assert kinds(MarsLion(model.parameters())) == ["matrix", "1d"]
    assert {role.kind for role in parameter_roles(model).values()} == {"matrix", "1d"}


@pytest.mark.parametrize("orthogonalize", [False, True])
@pytest.mark.parametrize("method", ["mars_shampoo", "mars_m"])
def test_shampoo_leaves_embeddings_to_adamw(method, orthogonalize):
    embedding, hidden, bias = make_params([(9, 4), (4, 4), (4,)])
    optimizer = make(
        method,
        [{"params": [embedding], "kind": "embedding"}, {"params": [hidden, bias]}],
        orthogonalize_embeddings=orthogonalize,
    )
    update = "shampoo" if orthogonalize else "adamw"
    assert [group["update"] for group in optimizer.param_groups] == [update, "shampoo", "adamw"]
    # lr_1d is the learning rate of everything that is not orthogonalised; MARS-M has one learning rate for everything
    lr_1d = 0.02 if method == "mars_m" else 0.01
    assert [group["lr"] for group in optimizer.param_groups] == [0.02 if orthogonalize else lr_1d, 0.02, lr_1d]
    group = group_of(optimizer, embedding)
    plain = method == "mars_m" and not orthogonalize
    assert (group["gamma"], group["max_norm"]) == ((0.0, None) if plain else (0.025, 1.0))
    _, keywords, _ = METHODS[method]
    common = {"lr": 0.02, "orthogonalize_embeddings": orthogonalize, **keywords}
    refs = references("shampoo", [embedding], kind="embedding", **common)
    refs += references("shampoo", [hidden, bias], **common)
    check_follows(optimizer, [embedding, hidden, bias], refs)


SCALES = [
    # method, layout, shape, s
    ("mars_shampoo", None, (8, 2), 2.0),  # sqrt(max(1, fan_out / fan_in))
    ("mars_shampoo", None, (2, 8), 1.0),
    ("mars_shampoo", "out_in", (8, 2), 2.0),
    ("mars_shampoo", "in_out", (8, 2), 1.0),
    ("mars_shampoo", "in_out", (2, 8), 2.0),
    ("mars_shampoo", None, (3, 8, 2), 2.0),  # a stack
    ("mars_shampoo", "in_out", (3, 2, 8), 2.0),
    ("mars_shampoo", "conv", (36, 2, 2), 3.0),  # (out, everything else)
    ("mars_shampoo", "conv", (8, 1, 2, 1), 2.0),
    ("mars_shampoo", None, (8, 1, 2, 1), 2.0),
    ("mars_shampoo", "conv", (2, 3, 3, 3), 1.0),
    ("mars_m", None, (9, 4), 0.6),  # 0.2 sqrt(max(rows, columns))
    ("mars_m", "in_out", (4, 9), 0.6),
    ("mars_m", None, (3, 4, 9), 0.6),
    ("mars_m", "conv", (4, 4, 2, 2), 0.8),
]


@pytest.mark.parametrize("method, layout, shape, s", SCALES)
def test_the_scale_depends_on_the_layout(method, layout, shape, s):
    """With the exact form the update of each matrix has k = min(rows, columns) singular values s, norm s sqrt(k)."""
    params = make_params([shape])
    before = values(params)
    stated = {} if layout is None else {"kind": "matrix", "layout": layout}
    optimizer = make(method, [{"params": params, **stated}], lr=1.0, ns_steps=None)
    run_steps(optimizer, params, make_gradients(params, 1))
    move = before[0] - params[0].detach()
    is_stack = move.ndim == 3 and layout != "conv"
    for matrix in move if is_stack else [move.flatten(1)]:
        assert matrix.norm().item() == pytest.approx(s * math.sqrt(min(matrix.shape)), rel=1e-12)
    _, keywords, variant = METHODS[method]
    refs = references(variant, params, lr=1.0, layout=layout or "out_in", **keywords)
    optimizer = make(method, [{"params": params, **stated}], lr=1.0)
    check_follows(optimizer, params, refs)


@EVERY_METHOD
def test_an_empty_group_is_kept(method):
    """With LoRA, transformers' second group (no decay) has no parameters."""
    params = make_params([(4, 3)])
    optimizer = make(method, [{"params": params, "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}])
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    scheduler = LambdaLR(optimizer, [lambda t: 0.5] * 2)
    run_steps(optimizer, params, make_gradients(params, 3), scheduler)
    fresh = make(method, [{"params": make_params([(4, 3)])}, {"params": []}])
    fresh.load_state_dict(optimizer.state_dict())
    assert_same_state(fresh, optimizer)


@EVERY_METHOD
def test_add_param_group(method):
    _, keywords, variant = METHODS[method]
    first, second = make_params([(4, 3)]), make_params([(3, 5), (6,)], seed=5)
    optimizer = make(method, first)
    refs = references(variant, first, lr=0.02, **keywords)
    check_follows(optimizer, first, refs)
    optimizer.add_param_group({"params": second, "lr": 0.05, "gamma": 0.2})
    refs += references(variant, second, lr=0.05, gamma=0.2, **keywords)
    assert len(optimizer.param_groups) == 3
    check_follows(optimizer, first + second, refs, seed=2)


# --- State


def assert_same_state(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual["param_groups"] == expected["param_groups"]
    assert actual["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert actual["state"][index].keys() == state.keys()
        for key, value in state.items():
            loaded = actual["state"][index][key]
            if torch.is_tensor(value):
                assert loaded.dtype == value.dtype, key
                assert torch.equal(loaded, value), key
            else:
                assert loaded == value, key


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
    params = make_params(SHAPES, dtype=dtype)
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
    params = make_params(SHAPES)
    optimizer = saved(params, **options)
    run_steps(optimizer, params, make_gradients(params, 2))
    with pytest.raises(ValueError, match=UPDATE[saved]):
        loading(params, **options).load_state_dict(optimizer.state_dict())


# --- Gradients


def feed_fresh(optimizer, params, gradients):
    run_steps(optimizer, params, gradients)


def feed_zeroed_in_place(optimizer, params, gradients):
    for step in gradients:
        optimizer.zero_grad(set_to_none=False)
        for p, g in zip(params, step, strict=True):
            p.backward(g)  # accumulates into p.grad where there is one
        optimizer.step()


def feed_a_reused_buffer(optimizer, params, gradients):
    for p in params:
        p.grad = torch.empty_like(p)
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad.copy_(g)
        optimizer.step()


def feed_a_swapped_buffer(optimizer, params, gradients):
    """Another gradient object every step, in the same memory: what a bucket's views are."""
    buffers = [torch.empty_like(p) for p in params]
    for step in gradients:
        for p, buffer, g in zip(params, buffers, step, strict=True):
            p.grad = None
            p.grad = buffer.copy_(g).view_as(p)
        optimizer.step()


def feed_then_spoil(optimizer, params, gradients):
    for step in gradients:
        run_steps(optimizer, params, [step])
        for p in params:
            p.grad.fill_(float("nan"))


FEEDS = [feed_zeroed_in_place, feed_a_reused_buffer, feed_a_swapped_buffer, feed_then_spoil]
KERNELS = pytest.mark.parametrize("kernel", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)


@KERNELS
@pytest.mark.parametrize("max_norm", [1.0, None])
@pytest.mark.parametrize("feed", FEEDS)
@EVERY_METHOD
def test_the_last_gradient_is_never_an_alias(method, feed, max_norm, kernel):
    finals = []
    for way in (feed_fresh, feed):
        params = make_params([(4, 3), (2, 3, 4), (6,)])
        optimizer = make(method, params, gamma=0.5, max_norm=max_norm, **kernel)
        way(optimizer, params, make_gradients(params, 12, scales=(0.05, 1.0)))
        finals.append(values(params))
    assert_equal(*finals)
    corrected = make_params([(4, 3), (2, 3, 4), (6,)])
    plain = make(method, corrected, gamma=0.0, max_norm=max_norm, **kernel)
    feed_fresh(plain, corrected, make_gradients(corrected, 12, scales=(0.05, 1.0)))
    assert not torch.equal(corrected[0], finals[0][0])  # the correction matters here


@KERNELS
@pytest.mark.parametrize("max_norm", [0.1, None])
@EVERY_METHOD
def test_step_leaves_gradients_alone(method, max_norm, kernel):
    params = make_params()
    optimizer = make(method, params, weight_decay=0.1, max_norm=max_norm, **kernel)
    for step in make_gradients(params, 3):
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        objects = [p.grad for p in params]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params, objects, strict=True))
        assert_equal([p.grad for p in params], step)


@pytest.mark.parametrize("kernel", [{"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("when", [0, 2])
@EVERY_METHOD
def test_nonfinite_gradients_are_not_remembered(method, when, kernel):
    params = make_params([(4, 3), (3, 4)])
    optimizer = make(method, params, **kernel)
    gradients = make_gradients(params, 4)
    spoilt = gradients[when][0]
    spoilt[0, 0], spoilt[1, 1], spoilt[2, 2] = float("nan"), float("inf"), -float("inf")
    run_steps(optimizer, params, gradients[: when + 1])
    last = optimizer.state[params[0]]["last_grad"]
    finite = spoilt.isfinite()
    # what stands for a non-finite entry is nothing, or an older gradient's: no larger than gradients are
    assert (last.abs() <= max(g[0][g[0].isfinite()].abs().max() for g in gradients)).all()
    assert torch.equal(last[finite], spoilt[finite])
    assert torch.equal(optimizer.state[params[1]]["last_grad"], gradients[when][1])
    run_steps(optimizer, params, gradients[when + 1 :])
    assert torch.equal(optimizer.state[params[0]]["last_grad"], gradients[-1][0])
    assert params[1].isfinite().all()  # the other parameter never noticed


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    for cls in CLASSES:
        optimizer = cls(embedding.parameters())
        embedding(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()


@EVERY_CLASS
def test_complex_parameters_are_refused(cls):
    with pytest.raises(ValueError, match="complex"):
        cls([nn.Parameter(torch.zeros(3, 4, dtype=torch.complex64))])


# --- Arguments

NAN = float("nan")
WRONG = [
    # argument, value, words of the allowed range
    ("lr", -1.0, ["0"]),
    ("lr", NAN, ["0"]),
    ("lr", "fast", ["0"]),
    ("lr_1d", -1.0, ["0"]),
    ("betas", (1.0, 0.9), ["0", "1"]),
    ("betas", (0.9, 1.0), ["0", "1"]),
    ("betas", (-0.1, 0.9), ["0", "1"]),
    ("betas", (0.9,), ["0", "1"]),
    ("betas", (0.9, 0.95, 0.99), ["0", "1"]),
    ("betas", 0.9, ["0", "1"]),
    ("betas_1d", (0.9, 1.5), ["0", "1"]),
    ("betas_1d", (0.9,), ["0", "1"]),
    ("eps", -1.0, ["0"]),
    ("weight_decay", -1.0, ["0"]),
    ("weight_decay", float("inf"), ["0"]),
    ("gamma", -0.1, ["0", "1"]),
    ("gamma", 1.1, ["0", "1"]),
    ("gamma", NAN, ["0", "1"]),
    ("gamma", None, ["0", "1"]),
    ("max_norm", 0.0, ["0", "None"]),
    ("max_norm", -1.0, ["0", "None"]),
    ("max_norm", NAN, ["0", "None"]),
]
WRONG_IN_SHAMPOO = [
    ("ns_steps", 0, ["1"]),
    ("ns_steps", -3, ["1"]),
    ("ns_steps", 2.5, ["1"]),
    ("adjust_lr_fn", "foo", ["original", "match_rms_adamw"]),
]
WRONG_IN_A_GROUP = [
    ("kind", "matrx", ["matrix", "embedding", "1d"]),
    ("layout", "out", ["out_in", "in_out", "conv"]),
]


def refuses(argument, value, words):
    """A ValueError that names the argument, the value and, beside these two, the allowed range."""

    class Check:
        def __enter__(self):
            self.raises = pytest.raises(ValueError)
            self.info = self.raises.__enter__()

        def __exit__(self, *exception):
            assert self.raises.__exit__(*exception), f"{argument}={value!r} was accepted"
            message = str(self.info.value)
            assert re.search(rf"\b{argument}\b", message), message
            shown = value[0] if isinstance(value, tuple) and len(value) == 1 else value
            assert str(shown) in message or repr(value) in message, message
            rest = message.replace(repr(value), "", 1).replace(argument, "", 1)
            assert all(word in rest for word in words), message
            return True

    return Check()


@EVERY_CLASS
@pytest.mark.parametrize("argument, value, words", WRONG)
def test_wrong_values(cls, argument, value, words):
    with refuses(argument, value, words):
        cls(make_params([(3, 4), (5,)]), **{argument: value})
    if argument not in {"lr_1d", "betas_1d"}:
        with refuses(argument, value, words):
            cls([{"params": make_params([(3, 4), (5,)]), argument: value}])


@pytest.mark.parametrize("argument, value, words", WRONG_IN_SHAMPOO)
def test_wrong_values_of_shampoo(argument, value, words):
    with refuses(argument, value, words):
        MarsShampoo(make_params([(3, 4), (5,)]), **{argument: value})


@EVERY_CLASS
@pytest.mark.parametrize("argument, value, words", WRONG_IN_A_GROUP)
def test_wrong_values_of_a_group(cls, argument, value, words):
    with refuses(argument, value, words):
        cls([{"params": make_params([(3, 4)]), "kind": "matrix", argument: value}])


@EVERY_CLASS
def test_extreme_values_that_are_allowed(cls):
    params = make_params(SHAPES)
    optimizer = cls(params, lr=0, betas=(0.0, 0.0), eps=0, weight_decay=0, gamma=1, max_norm=1, lr_1d=0)
    before = values(params)
    assert_equal(run_steps(optimizer, params, make_gradients(params, 2)), before)


@EVERY_CLASS
def test_duplicates_are_refused(cls):
    (w,) = make_params([(3, 4)])
    with pytest.raises(ValueError, match=r"duplicate|more than one|twice"):
        cls([w, w])
    with pytest.raises(ValueError, match=r"duplicate|more than one|twice"):
        cls([{"params": [w]}, {"params": [w]}])


@EVERY_CLASS
def test_keyword_only(cls):
    """gamma by position could be taken for a beta."""
    params = make_params([(3, 4)])
    with pytest.raises(TypeError):
        cls(params, 1e-3, (0.95, 0.99), 1e-8, 0.0, 0.025)
    (group,) = cls(params, 1e-3, (0.9, 0.98), 1e-7, 0.2).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-3, (0.9, 0.98), 1e-7, 0.2)
    with pytest.raises(TypeError, match="gama"):
        cls(params, gama=0.1)


# --- Manners


@EVERY_METHOD
def test_closure(method):
    params = make_params(SHAPES)
    optimizer = make(method, params)
    before = values(params)

    def closure():
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[0] == pytest.approx(sum((x**2).sum().item() for x in before))
    assert losses[-1] < losses[0]
    assert optimizer.step() is None


@EVERY_METHOD
def test_schedulers_scale_every_group(method):
    params = make_params(SHAPES)
    optimizer = make(method, params, lr=0.02, lr_1d=0.005)
    scheduler = LambdaLR(optimizer, factor)
    for t, step in enumerate(make_gradients(params, 20)):
        matrix, vector = (group["lr"] for group in optimizer.param_groups)
        assert matrix == pytest.approx(0.02 * factor(t))
        assert matrix / vector == pytest.approx(4.0)
        run_steps(optimizer, params, [step], scheduler)


@pytest.mark.parametrize("max_norm", [1.0, None])
@EVERY_METHOD
def test_step_never_waits_for_the_device(method, max_norm):
    """A tensor on "meta" has no value: whatever asks for one (.item(), float(), if) raises."""
    params = [nn.Parameter(p.to("meta")) for p in make_params(dtype=torch.float32)]
    optimizer = make(method, params, max_norm=max_norm, weight_decay=0.1, foreach=True)
    for _ in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()


@pytest.mark.parametrize("cls", [MarsAdamW, MarsLion])
def test_empty_shards(cls):
    """Engines that slice flattened parameters leave some ranks with nothing of a parameter."""
    params = make_params([(12,), (0,)])
    optimizer = cls([{"params": params, "kind": "matrix"}], lr=0.02, max_norm=None)
    run_steps(optimizer, params, make_gradients(params, 3))
    assert params[0].isfinite().all()


@EVERY_METHOD
def test_settings_are_plain_values(method):
    """Checkpoint formats take numbers, names and lists of them; FSDP2's refuses a torch.dtype."""
    optimizer = make(method, make_params(), state_dtype=torch.bfloat16, last_grad_dtype="float32")

    def is_plain(value):
        return type(value) in (int, float, str, bool, type(None)) or (
            type(value) in (tuple, list) and all(map(is_plain, value))
        )

    for group in optimizer.param_groups:
        assert (group["state_dtype"], group["last_grad_dtype"]) == ("bfloat16", "float32")
        assert all(is_plain(value) for key, value in group.items() if key != "params")


@pytest.mark.parametrize("cls", [MarsAdamW, MarsLion, MarsShampoo])
def test_parameters_that_fsdp1_flattens_later_are_refused(cls):
    """accelerator.prepare(model, optimizer) wraps the model when the optimizer is made."""
    params = make_params([(6, 4)])
    optimizer = cls(params, max_norm=None)
    params[0].data = params[0].data.flatten()
    params[0]._fsdp_flattened = True
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(ValueError, match=r"FSDP1 has flattened a parameter.*fsdp_version: 2"):
        optimizer.step()


@EVERY_METHOD
def test_named_parameters(method):
    """torch takes (name, parameter) pairs; the names survive the split, where torch's checkpoints look for them."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = make(method, model.named_parameters())
    assert kinds(optimizer) == ["matrix", "1d"]
    names = [group.get("param_names") for group in optimizer.param_groups]
    assert names == [["0.weight", "1.weight"], ["0.bias", "1.bias"]]


def imported_modules(file):
    """Every module that a file imports anywhere in it, with leading dots for relative ones."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


TRITON = ("gpu.py", "triton_kernels.py")


def test_only_torch_is_imported():
    files = sorted(OPTIM.rglob("*.py"))
    assert {"mars.py", "adamw.py", "newton_schulz.py"} <= {file.name for file in files}
    for file in files:
        # Triton comes with torch's builds for GPUs; gpu.py does without where it is missing.
        allowed = {"torch", *sys.stdlib_module_names, *({"triton"} if file.name in TRITON else ())}
        for module in imported_modules(file):
            inside = module.startswith(".") and not module.startswith("..")
            inside |= module.startswith("hf_mars.optim")
            assert inside or module.split(".")[0] in allowed, f"{file.name} imports {module}"


def test_runs_where_there_is_no_transformers():
    """hf_mars.optim by itself, its parent package not executed and transformers impossible to import."""
    script = f"""
import sys, types, torch
sys.modules.update(transformers=None, accelerate=None, datasets=None)
parent = types.ModuleType("hf_mars")
parent.__path__ = [{str(OPTIM.parent)!r}]
sys.modules["hf_mars"] = parent
from hf_mars.optim import MarsAdamW, MarsLion, MarsShampoo
w = torch.nn.Parameter(torch.ones(3, 2))
for cls in (MarsAdamW, MarsLion, MarsShampoo):
    w.grad = torch.ones(3, 2)
    cls([w]).step()
assert (w < 1).all()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("method", ["mars_lion", "mars_shampoo"])
def test_clip_turned_off_midway_leaves_no_parameter_behind(method):
    """One that gets its first gradient later, alone, is updated as those that already keep a g_{t-1}."""
    cls, keywords, _ = METHODS[method]
    finals = []
    for max_norm in (None, 1e30):
        params = make_params([(3, 4), (4, 3)])
        optimizer = cls(params, lr=0.02, max_norm=1.0, **keywords)
        gradients = make_gradients(params, 12)
        for t, (first, second) in enumerate(gradients):
            optimizer.param_groups[0]["max_norm"] = 1.0 if t < 4 else max_norm
            run_steps(optimizer, params, [[None if t == 5 else first, None if t < 5 else second]])
        finals.append(values(params))
    assert_close(*finals, 1e-12)
