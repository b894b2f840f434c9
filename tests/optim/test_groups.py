"""Groups of parameters: hyperparameters of their own, kinds, layouts, learning rates."""

import math

import pytest
import torch
from helpers import (
    EVERY_CLASS,
    EVERY_METHOD,
    FEW_SHAPES,
    METHODS,
    UPDATE,
    assert_close,
    assert_equal,
    assert_same_state,
    kinds,
    make,
    make_gradients,
    make_params,
    run_steps,
    values,
)
from reference import references
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from hf_mars.optim import MarsAdamW, MarsLion, MarsShampoo, parameter_roles


def group_of(optimizer, param):
    (group,) = (g for g in optimizer.param_groups if any(p is param for p in g["params"]))
    return group


@EVERY_CLASS
def test_hyperparameters_live_in_the_groups(cls):
    keys = {"lr", "betas", "eps", "weight_decay", "gamma", "max_norm", "exact", "foreach", "fused", "kind", "update"}
    if cls is MarsShampoo:
        keys |= {"ns_steps", "adjust_lr_fn"}
    optimizer = cls(make_params([(3, 4), (5,)]))
    for group in optimizer.param_groups:
        assert keys <= group.keys()
    matrix = optimizer.param_groups[0]
    defaults = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "gamma": 0.05, "max_norm": None}
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
    of_lr = 1 if cls is MarsAdamW else 0.5  # an lr that is AdamW's own serves 1d parameters as it is
    for group, params, wanted in [
        (first, [w], {"kind": "matrix", "lr": 0.2, "weight_decay": 0.1, "gamma": 0.05, "update": UPDATE[cls]}),
        (first_1d, [b, scalar], {"kind": "1d", "lr": 0.2 * of_lr, "weight_decay": 0.1}),
        (second, [other_w], {"kind": "matrix", "lr": 0.5, "weight_decay": 0.0, "gamma": 0.3, "note": "mine"}),
        (second_1d, [other_b], {"kind": "1d", "lr": 0.5 * of_lr, "weight_decay": 0.0, "note": "mine"}),
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

    assert rates(make_params([(3, 4), (5,)]), lr=0.2) == [0.2, 0.2 if cls is MarsAdamW else 0.1]
    assert rates(make_params([(3, 4), (5,)]), lr=0.2, lr_1d=0.7) == [0.2, 0.7]
    assert rates(make_params([(3, 4), (5,)]), lr=0.2, lr_1d=0.0) == [0.2, 0.0]
    assert rates(make_params([(3, 4), (5,)]), lr=0.0) == [0.0, 0.0]
    assert rates(make_params([(3, 4), (5,)]), lr=0.0, lr_1d=0.3) == [0.0, 0.3]
    groups = [{"params": make_params([(3, 4), (5,)]), "lr": 0.4}, {"params": make_params([(3, 4), (5,)])}]
    assert rates(groups, lr=0.2, lr_1d=0.7) == [0.4, 0.7, 0.2, 0.7]
    groups = [{"params": make_params([(3, 4), (5,)]), "lr_1d": 0.4}, {"params": make_params([(3, 4), (5,)])}]
    assert rates(groups, lr=0.2) == [0.2, 0.4, 0.2, 0.2 if cls is MarsAdamW else 0.1]


@EVERY_METHOD
def test_lr_zero(method):
    params = make_params(FEW_SHAPES)
    before = values(params)
    assert_equal(run_steps(make(method, params, lr=0.0, weight_decay=0.1), params, make_gradients(params, 3)), before)


@pytest.mark.parametrize("cls", [MarsAdamW, MarsLion])
def test_optimize_1d_gives_every_parameter_the_same(cls):
    groups = cls(make_params(FEW_SHAPES), lr=0.2, optimize_1d=True).param_groups
    assert [group["kind"] for group in groups] == ["matrix", "1d"]
    for group in groups:
        assert (group["lr"], group["betas"], group["update"]) == (0.2, (0.9, 0.99), UPDATE[cls])
        assert (group["gamma"], group["max_norm"]) == (0.05, None)


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
    method = {MarsAdamW: "mars_adamw", MarsLion: "mars_lion"}[cls]
    optimizer = make(method, [{"params": params, "kind": "matrix"}], lr=0.02, max_norm=None)
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
    with pytest.raises(RuntimeError, match=r"flat slice of shape \(12,\).*DeepSpeed 0\.19\.8's ZeRO.*FSDP2"):
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
