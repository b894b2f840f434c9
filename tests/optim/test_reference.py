"""Every optimizer equals tests/reference.py, which is written from the equations.

Errors are taken per tensor, relative to its largest entry. 40 steps move the parameters, which start near one, by 0.05
and more, so this measures the updates too. In float64 the bound is 1e-12: thousands of roundings of 1e-16. In float32
it is 1e-5, against the float64 reference fed with the same gradients.
"""

import pytest
import torch
from helpers import (
    EVERY_METHOD,
    METHODS,
    TiedLanguageModel,
    assert_close,
    assert_equal,
    factor,
    make,
    make_gradients,
    make_params,
    run_steps,
    values,
)
from reference import references
from torch.func import functional_call

STEPS = 40
LR = 0.1
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)

# Seven small steps, then three large ones: the clip is active on some steps and not on others.
CALM_AND_STORM = (0.002,) * 7 + (3.0,) * 3

OPTIONS = {
    "default": {},
    "decay": {"weight_decay": 0.1},
    "gamma_0": {"gamma": 0.0, "weight_decay": 0.1},
    "gamma_0.3": {"gamma": 0.3, "weight_decay": 0.1},
    "gamma_1": {"gamma": 1.0},
    "max_norm_0.3": {"max_norm": 0.3},
    "max_norm_none": {"max_norm": None},
    "max_norm_none_gamma_0": {"max_norm": None, "gamma": 0.0},
    "max_norm_none_gamma_0.3": {"max_norm": None, "gamma": 0.3, "weight_decay": 0.1},
    "betas_eps": {"betas": (0.9, 0.999), "betas_1d": (0.8, 0.99), "eps": 1e-3},
    "lr_1d": {"lr_1d": 0.2, "weight_decay": 0.1},
    "optimize_1d": {"optimize_1d": True},
}


def build(method, params, **options):
    """The optimizer, its learning-rate schedule and its references."""
    _, keywords, variant = METHODS[method]
    optimizer = make(method, params, lr=LR, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    switches = {"foreach", "fused"}
    stated = {name: value for name, value in options.items() if name not in switches}
    return optimizer, scheduler, references(variant, params, lr=LR, **keywords, **stated)


def follow(refs, gradients):
    for t, step in enumerate(gradients):
        for ref, g in zip(refs, step, strict=True):
            ref.step(g, factor(t))
    return [ref.x for ref in refs]


# Shampoo cannot orthogonalise a vector: see test_optimize_1d_of_shampoo.
CASES = [
    (method, name)
    for method in METHODS
    for name in OPTIONS
    if name != "optimize_1d" or METHODS[method][2] != "shampoo"
]


@DTYPES
@pytest.mark.parametrize("method, name", CASES)
def test_equals_the_reference(method, name, dtype):
    options = OPTIONS[name]
    params = make_params(dtype=dtype)
    optimizer, scheduler, refs = build(method, params, **options)
    scales = (1.0,) if options.get("max_norm", 1.0) is None else CALM_AND_STORM
    gradients = make_gradients(params, STEPS, scales=scales)
    before = [ref.x for ref in refs]
    expected = follow(refs, gradients)
    assert_close(run_steps(optimizer, params, gradients, scheduler), expected, TOLERANCE[dtype])
    for ref, x in zip(refs, before, strict=True):
        assert (ref.x - x).abs().max() > 0.05  # the comparison is of moved parameters
        if ref.max_norm is not None:
            assert 0 < sum(ref.clipped) < STEPS


@pytest.mark.parametrize("method", ["mars_lion", "mars_shampoo", "mars_m"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_gamma_1_without_clipping(method, weight_decay):
    """m_t = g_t - beta1^t g_1: the one combination of an average and g_t that the average drops out of."""
    params = make_params()
    optimizer, scheduler, refs = build(method, params, gamma=1.0, max_norm=None, weight_decay=weight_decay)
    gradients = make_gradients(params, STEPS)
    actual = run_steps(optimizer, params, gradients, scheduler)
    # kappa = 19: c_t is 20 times larger than m_t, and Newton-Schulz multiplies what is lost by up to 500
    assert_close(actual, follow(refs, gradients), 1e-11)


@pytest.mark.parametrize("method", ["mars_shampoo", "mars_m"])
def test_optimize_1d_of_shampoo(method):
    """A vector has no orthogonal form: with optimize_1d it gets MARS-AdamW, as what else is not orthogonalised."""
    _, keywords, _ = METHODS[method]
    params = make_params()
    optimizer, scheduler, _ = build(method, params, optimize_1d=True, lr_1d=0.02)
    gradients = make_gradients(params, STEPS, scales=CALM_AND_STORM)
    matrices, vectors = ([p for p in params if (p.ndim > 1) == wanted] for wanted in (True, False))
    refs = dict(zip(matrices, references("shampoo", matrices, lr=LR, **keywords), strict=True))
    refs |= dict(zip(vectors, references("adamw", vectors, lr=0.02, optimize_1d=True), strict=True))
    expected = follow([refs[p] for p in params], gradients)
    assert_close(run_steps(optimizer, params, gradients, scheduler), expected, 1e-12)


@pytest.mark.parametrize("max_norm", [1.0, None])
@pytest.mark.parametrize("switch", ["foreach", "fused"])
@EVERY_METHOD
def test_foreach_and_fused_are_the_same(method, switch, max_norm):
    finals = []
    for value in (True, False):
        params = make_params()
        gradients = make_gradients(params, STEPS, scales=CALM_AND_STORM if max_norm else (1.0,))
        optimizer, scheduler, refs = build(method, params, weight_decay=0.1, max_norm=max_norm, **{switch: value})
        assert all(group[switch] is value for group in optimizer.param_groups)
        finals.append(run_steps(optimizer, params, gradients, scheduler))
    assert_close(finals[0], follow(refs, gradients), 1e-12)
    assert_close(finals[0], finals[1], 1e-12)


@pytest.mark.parametrize("max_norm", [1.0, None])
@EVERY_METHOD
def test_missing_gradients(method, max_norm):
    """Without a gradient a parameter rests: no decay, no clock, and g_{t-1} stays the last gradient that it had."""
    params = make_params()
    gradients = make_gradients(params, STEPS, scales=CALM_AND_STORM if max_norm else (1.0,))
    for t, step in enumerate(gradients):
        for i in range(len(step)):
            late, absent = t < 2 * i, (t + i) % 4 == 0  # the first gradient comes late: there c = g
            if late or absent:
                step[i] = None
    optimizer, scheduler, refs = build(method, params, gamma=0.3, weight_decay=0.1, max_norm=max_norm)
    for t, step in enumerate(gradients):
        before = values(params)
        run_steps(optimizer, params, [step], scheduler)
        for ref, g in zip(refs, step, strict=True):
            ref.step(g, factor(t))
        resting = [i for i, g in enumerate(step) if g is None]
        assert_equal([params[i] for i in resting], [before[i] for i in resting])
    assert all(0 < ref.t < STEPS for ref in refs)
    assert_close(params, [ref.x for ref in refs], 1e-12)


@EVERY_METHOD
def test_mixed_dtypes_and_memory_formats(method):
    """One group may hold float32 beside float64, transposed weights and channels-last convolutions."""
    shapes = [(7, 4), (7, 4), (4, 7), (6, 3, 2, 2)]
    params = make_params(shapes)
    params[1] = torch.nn.Parameter(params[1].detach().float())
    params[2] = torch.nn.Parameter(params[2].detach().T.contiguous().T)
    params[3] = torch.nn.Parameter(params[3].detach().to(memory_format=torch.channels_last))
    gradients = make_gradients(params, STEPS, scales=CALM_AND_STORM)
    optimizer, scheduler, refs = build(method, params, weight_decay=0.1)
    final, expected = run_steps(optimizer, params, gradients, scheduler), follow(refs, gradients)
    assert_close(final[1:2], expected[1:2], 1e-5)
    assert_close(final[:1] + final[2:], expected[:1] + expected[2:], 1e-12)


def loss_at(model, x, t):
    """A loss on batch t, as a function of the parameters; three batches in ten weigh two hundred times more."""
    tokens = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(t))
    logits = functional_call(model, x, (tokens[:, :-1],), tie_weights=True)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return loss * (20.0 if t % 10 > 6 else 0.1)


@DTYPES
@EVERY_METHOD
def test_tied_parameters(method, dtype):
    """One weight in two places is one parameter: it moves once a step, by the gradient through both uses.

    In float64 the reference trains on its own, with gradients at its own parameters; in float32, where the two would
    drift apart, it gets the gradients of the model.
    """
    torch.manual_seed(0)
    model = TiedLanguageModel().to(dtype)
    names, params = zip(*model.named_parameters(), strict=True)
    assert len(params) == len(list(model.named_parameters(remove_duplicate=False))) - 1
    optimizer, scheduler, refs = build(method, params, gamma=0.1, weight_decay=0.1, max_norm=0.7)
    for t in range(STEPS):
        loss_at(model, {}, t).backward()
        if dtype == torch.float64:
            x = {name: ref.x.clone().requires_grad_() for name, ref in zip(names, refs, strict=True)}
            gradients = torch.autograd.grad(loss_at(model, x, t), list(x.values()))
        else:
            gradients = [p.grad for p in params]
        for ref, g in zip(refs, gradients, strict=True):
            ref.step(g, factor(t))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert model.head.weight is model.embedding.weight
    assert_close(params, [ref.x for ref in refs], TOLERANCE[dtype])
    matrices = [ref for ref in refs if ref.x.ndim == 2]
    assert all(0 < sum(ref.clipped) < STEPS for ref in matrices)
