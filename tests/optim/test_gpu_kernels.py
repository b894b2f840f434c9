"""The Triton kernels (optim/gpu.py, triton_kernels.py) give what torch's kernels, composed, give.

They need a GPU, or TRITON_INTERPRET=1, with which test_triton.py runs this file where there is none.
"""

import math
import sys

import pytest
import torch
from helpers import assert_close, assert_equal, make_gradients, make_params, run_steps, values

from hf_mars.optim import MarsAdamW, MarsLion, MarsShampoo, gpu
from hf_mars.optim.last_grad import LastNorms

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and not gpu.is_interpreted(), reason="needs a GPU, or TRITON_INTERPRET=1"
)

DEVICE = "cpu" if gpu.is_interpreted() else "cuda"
METHODS = {"mars_adamw": MarsAdamW, "mars_lion": MarsLion}
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)

# Nothing, one element, less than a block, whole blocks, and more than a block, not whole.
SHAPES = [(0, 3), (1, 1), (3, 7), (64, 64), (50, 90)]


def params_of(shapes=SHAPES, dtype=torch.float32):
    return [torch.nn.Parameter(p.detach().to(DEVICE)) for p in make_params(shapes, dtype=dtype)]


def gradients_for(params, steps, **options):
    return [[g.to(DEVICE) for g in step] for step in make_gradients(params, steps, **options)]


@pytest.fixture
def calls(monkeypatch):
    """Counts the steps that kernels took."""
    counted = []
    step = gpu.step
    monkeypatch.setattr(gpu, "step", lambda *args, **kwargs: (counted.append(1), step(*args, **kwargs))[1])
    return counted


def assert_mostly_close(actual, expected, tolerance, method):
    """Lion's sign makes a whole step of a rounding error, where a momentum is next to zero: one in 10,000 may."""
    for a, e in zip(actual, expected, strict=True):
        if a.numel():
            differ = (a.double() - e.double()).abs() > tolerance * e.double().abs().max()
            assert differ.sum().item() <= (1e-4 * a.numel() if method == "mars_lion" else 0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_norm": None},
        {"max_norm": 0.3, "gamma": 0.0},
        {"gamma": 0.5, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.0},
        {"betas": (0.0, 0.0)},
    ],
    ids=str,
)
@EVERY_METHOD
def test_equals_the_composition(method, settings, calls):
    results = []
    for dtype, composed in ((torch.float32, {}), (torch.float64, {}), (torch.float64, {"foreach": True})):
        params = params_of(dtype=dtype)
        optimizer = METHODS[method](params, **{"lr": 0.01, "weight_decay": 0.1, **settings, **composed})
        scales = (1e-4, 0.1, 1.0)  # some tensors are clipped, some are not
        gradients = [[g.to(dtype) for g in step] for step in gradients_for(params_of(), 5, scales=scales)]
        results.append(run_steps(optimizer, params, gradients))
        results[-1] += [state["exp_avg"] for state in optimizer.state.values()]
    assert len(calls) == 10
    assert_mostly_close(results[0], results[2], 1e-5, method)
    assert_mostly_close(results[1], results[2], 1e-13, method)


@pytest.mark.parametrize("max_norm", [1.0, None])
@EVERY_METHOD
def test_bfloat16_with_wide_states_equals_float64(method, max_norm, calls):
    """Nothing but x + compensation is rounded: to 16 significant bits."""
    results = []
    for dtype, composed in ((torch.bfloat16, {}), (torch.float64, {"foreach": True})):
        params = params_of(dtype=torch.bfloat16)
        params = [torch.nn.Parameter(p.detach().to(dtype)) for p in params]
        wide = {"state_dtype": "float32", "last_grad_dtype": "float32"} if dtype == torch.bfloat16 else {}
        optimizer = METHODS[method](
            params, lr=1e-3, weight_decay=0.1, gamma=0.5, max_norm=max_norm, **wide, **composed
        )
        gradients = gradients_for(params_of(dtype=torch.bfloat16), 6, scales=(1e-4, 1.0))
        run_steps(optimizer, params, [[g.to(dtype) for g in step] for step in gradients])
        lost = [optimizer.state[p].get("compensation", torch.zeros_like(p)) for p in params]
        results.append([p.detach().double() + rest.double() for p, rest in zip(params, lost, strict=True)])
    assert len(calls) == 6
    assert_mostly_close(*results, 2**-15, method)


@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
@EVERY_METHOD
def test_half_the_state(method, state_dtype, calls):
    """Of float32 parameters; the average is as good as bfloat16 is, and the states keep their dtypes."""
    params, wide = params_of([(50, 90)]), params_of([(50, 90)], torch.float64)
    settings = {"lr": 0.01, "state_dtype": state_dtype, "last_grad_dtype": "bfloat16"}
    optimizer, reference = METHODS[method](params, **settings), METHODS[method](wide, lr=0.01, foreach=True)
    gradients = gradients_for(params_of([(50, 90)]), 4)
    run_steps(optimizer, params, gradients)
    run_steps(reference, wide, [[g.double() for g in step] for step in gradients])
    (state,), (expected,) = optimizer.state.values(), reference.state.values()
    assert len(calls) == 4
    assert state["last_grad"].dtype == torch.bfloat16
    assert state["exp_avg"].dtype == (torch.float32 if state_dtype is None else torch.bfloat16)
    assert_close([state["exp_avg"]], [expected["exp_avg"]], 2**-6)


@EVERY_METHOD
def test_plain_rounding(method, calls):
    """kahan_sum=False: x is rounded to nearest."""
    params = params_of([(50, 90)], torch.bfloat16)
    before = values(params)
    optimizer = METHODS[method](params, lr=1e-6, kahan_sum=False)
    run_steps(optimizer, params, gradients_for(params, 2))
    assert len(calls) == 2 and "compensation" not in optimizer.state[params[0]]
    # Only entries next to zero are changed by such small steps.
    assert ((params[0] == before[0]) | (before[0].abs() < 1e-3)).all()


@EVERY_METHOD
def test_exact_mode(method, calls):
    results = []
    for composed in ({}, {"foreach": True}):
        params = params_of([(6, 5), (40, 60)], torch.float64)
        optimizer = METHODS[method](params, lr=0.01, gamma=0.5, exact=True, **composed)
        for t in range(4):
            with optimizer.previous_point():
                sum(((t + 1) * p**2 + p).sum() for p in params).backward()
            sum(((t + 1) * p**2 + p).sum() for p in params).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all("last_grad" not in state for state in optimizer.state.values())
        results.append(values(params))
    assert len(calls) == 4
    assert_close(*results, 1e-13)


@EVERY_METHOD
def test_knowing_the_last_norm_changes_no_bit(method, monkeypatch):
    """Short gradients, then one that is clipped, which the last norm did not announce, then one that it did, …"""
    finals, found = [], []
    known_norms = gpu._known_norms
    monkeypatch.setattr(gpu, "_known_norms", lambda *args: (found.append(known_norms(*args)), found[-1])[1])
    for forgetful in (False, True):
        params = params_of()
        optimizer = METHODS[method](params, lr=0.01, gamma=0.5)
        for gradients in gradients_for(params, 7, scales=(1e-5, 1e-5, 3.0, 3.0, 1e-5)):
            run_steps(optimizer, params, [gradients])
            if forgetful:
                optimizer._last_norms = LastNorms()
        finals.append(values(params))
    assert [norms is None for norms in found] == [True] + [False] * 6 + [True] * 7
    assert_equal(*finals)


@pytest.mark.parametrize("how", ["in place", "another tensor", "other memory"])
@EVERY_METHOD
def test_a_last_grad_that_was_changed_is_measured(method, how):
    (param,) = params = params_of([(40, 60)])
    optimizer = METHODS[method](params, lr=0.01, gamma=0.5)
    gradients = gradients_for(params, 2, scales=(1e-5,))
    run_steps(optimizer, params, gradients[:1])
    state = optimizer.state[param]
    if how == "in place":
        state["last_grad"].mul_(1e8)
    elif how == "another tensor":
        state["last_grad"] = state["last_grad"] * 1e8
    else:
        state["last_grad"].data = state["last_grad"] * 1e8
    run_steps(optimizer, params, gradients[1:])
    assert state["exp_avg"].norm().item() == pytest.approx(0.05, rel=1e-2)  # (1 − β1) max_norm: it was clipped


@EVERY_METHOD
def test_rounding_of_the_last_grad_cannot_hide_a_clip(method):
    """‖g_{t−1}‖ is measured before g_{t−1} is rounded to bfloat16, which lengthens this one as much as can be."""
    (param,) = params_of([(64, 64)])
    optimizer = METHODS[method]([param], gamma=0.75, last_grad_dtype="bfloat16")
    kappa = 0.75 * 0.95 / 0.05
    first = torch.full_like(param, (1 + 2**-8 + 2**-16) / 2**11)
    length = first.norm().item()
    second = -first * (0.9985 - kappa * length) / (1 + kappa) / length  # (1+κ)‖g‖ + κ‖g_prev‖ = 0.9985
    momenta = []
    for gradient in (first, second):
        param.grad = gradient.clone()
        optimizer.step()
        momenta.append(optimizer.state[param]["exp_avg"].double())
    c = (momenta[1] - 0.95 * momenta[0]) / 0.05
    assert 0.99 < c.norm().item() < 1 + 1e-5


def test_an_infinite_momentum_has_a_sign():
    results = []
    for composed in ({}, {"foreach": True}):
        (param,) = params_of([(3, 2)])
        optimizer = MarsLion([param], lr=0.01, gamma=0.0, max_norm=None, **composed)
        for value in (1.0, math.inf, 1.0):
            param.grad = torch.full_like(param, value)
            optimizer.step()
        results.append(param.detach().clone())
    assert_equal(*[[result] for result in results])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("max_norm", [1.0, None])
@EVERY_METHOD
def test_a_bad_gradient_is_bad_in_the_same_entries_and_is_not_remembered(method, max_norm, bad):
    results = []
    for composed in ({}, {"foreach": True}):
        params = params_of([(30, 20), (5, 4)])
        optimizer = METHODS[method](params, lr=0.01, gamma=0.5, max_norm=max_norm, **composed)
        gradients = gradients_for(params, 3)
        gradients[1][0][2, 3] = bad
        results.append(run_steps(optimizer, params, gradients[:2]))
        for param in params:
            last_grad = optimizer.state[param].get("last_grad")
            assert last_grad is None or last_grad.isfinite().all()
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual.isfinite(), expected.isfinite())
        assert_close([actual.nan_to_num(posinf=0, neginf=0)], [expected.nan_to_num(posinf=0, neginf=0)], 1e-5)


@EVERY_METHOD
def test_autograd_notices_the_update(method):
    (param,) = params_of([(3, 2)])
    optimizer = METHODS[method]([param])
    loss = (param**2).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_of_several_dtypes(calls):
    """Each dtype takes its own launches."""
    params = [*params_of([(5, 4)], torch.bfloat16), *params_of([(5, 4), (4, 3)]), *params_of([(6, 2)], torch.float64)]
    optimizer = MarsAdamW(params, lr=0.01)
    before = values(params)
    run_steps(optimizer, params, gradients_for(params, 2))
    assert len(calls) == 2 * 3
    assert all(not torch.equal(p, q) and p.isfinite().all() for p, q in zip(params, before, strict=True))


def test_embeddings_of_shampoo(calls):
    """And 1d parameters, where they need Kahan summation; in float32 plain AdamW is torch's."""
    for dtype, launches in ((torch.float32, 1), (torch.bfloat16, 2)):
        calls.clear()
        embedding, hidden, bias = params_of([(5, 4), (4, 4), (4,)], dtype)
        optimizer = MarsShampoo([{"params": [embedding], "kind": "embedding"}, {"params": [hidden, bias]}])
        run_steps(optimizer, [embedding, hidden, bias], gradients_for([embedding, hidden, bias], 1))
        assert len(calls) == launches


@pytest.mark.parametrize(
    "make",
    [
        lambda: (torch.nn.Parameter(torch.randn(3, 4, device=DEVICE).mT), {}),
        lambda: (torch.nn.Parameter(torch.randn(13, device=DEVICE)[1:].view(4, 3)), {}),
        lambda: (torch.nn.Parameter(torch.randn(4, 3, device=DEVICE)), {"foreach": True}),
        lambda: (torch.nn.Parameter(torch.randn(4, 3, device=DEVICE)), {"fused": False}),
        lambda: (torch.nn.Parameter(torch.randn(4, 3, device=DEVICE)), {"max_norm": None, "gamma": 0.0}),
    ],
    ids=["strided", "not aligned", "foreach", "not fused", "AdamW"],
)
def test_what_they_do_not_take_is_composed(make, calls):
    param, settings = make()
    optimizer = MarsAdamW([param], **settings)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert not calls and optimizer.state[param]["exp_avg"].count_nonzero() == 12


def test_a_compensation_of_another_dtype_is_composed(calls):
    """As after ``param.data = param.data.half()``: two bytes each, but other bits."""
    (param,) = params_of([(4, 3)], torch.bfloat16)
    optimizer = MarsAdamW([param], lr=1e-3)
    run_steps(optimizer, [param], gradients_for([param], 1))
    before = param.detach().double()
    param.data = param.data.half()
    param.grad = None
    run_steps(optimizer, [param], gradients_for([param], 1))
    assert len(calls) == 1 and (param.double() - before).abs().max() < 0.01


def test_without_triton_steps_are_composed_and_a_warning_says_so(calls, monkeypatch):
    monkeypatch.setitem(sys.modules, "hf_mars.optim.triton_kernels", None)
    monkeypatch.delattr("hf_mars.optim.triton_kernels", raising=False)
    gpu.kernels_for.cache_clear()
    (param,) = params_of([(4, 3)])
    optimizer = MarsAdamW([param])
    try:
        with pytest.warns(UserWarning, match="Triton kernels do not run on .*ModuleNotFoundError"):
            run_steps(optimizer, [param], gradients_for([param], 2))
    finally:
        gpu.kernels_for.cache_clear()
    assert not calls and optimizer.state[param]["step"] == 2


def test_a_state_of_another_shape_is_an_error_and_no_write_beyond_it(calls):
    params, other = params_of([(6, 5)]), params_of([(3, 5)])
    optimizer, theirs = MarsAdamW(params), MarsAdamW(other)
    run_steps(theirs, other, gradients_for(other, 1))
    optimizer.load_state_dict(theirs.state_dict())
    calls.clear()
    with pytest.raises(RuntimeError):
        run_steps(optimizer, params, gradients_for(params, 1))
    assert not calls
