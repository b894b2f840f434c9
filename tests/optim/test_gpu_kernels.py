"""What the Triton kernels alone are asked; what the compiled step on CPUs is asked too is in test_kernels.py.

They need a GPU, or TRITON_INTERPRET=1, with which test_triton.py runs this file where there is none.
"""

import math
import sys

import pytest
import torch
from helpers import assert_close, assert_equal, make, run_steps, values
from kernel_helpers import COMPOSED, EVERY_FUSED, EXECUTIONS, NEEDS_GPU, assert_mostly_close, gpu, short_and_clipped

from hf_mars.optim import MarsAdamW, MarsLion, MarsShampoo
from hf_mars.optim.last_grad import LastNorms

pytestmark = NEEDS_GPU

GPU = EXECUTIONS["gpu"]
DEVICE = GPU.device


@pytest.fixture
def execution():
    return GPU


@pytest.mark.parametrize("max_norm", [1.0, None])
@EVERY_FUSED
def test_bfloat16_with_wide_states_equals_float64(method, max_norm, calls):
    """Nothing but x + compensation is rounded: to 16 significant bits."""
    results = []
    for dtype, composed in ((torch.bfloat16, {}), (torch.float64, COMPOSED)):
        params = GPU.params(dtype=torch.bfloat16)
        params = [torch.nn.Parameter(p.detach().to(dtype)) for p in params]
        wide = {"state_dtype": "float32", "last_grad_dtype": "float32"} if dtype == torch.bfloat16 else {}
        optimizer = make(method, params, lr=1e-3, weight_decay=0.1, gamma=0.5, max_norm=max_norm, **wide, **composed)
        gradients = GPU.gradients(GPU.params(dtype=torch.bfloat16), 6, scales=(1e-4, 1.0))
        run_steps(optimizer, params, [[g.to(dtype) for g in step] for step in gradients])
        lost = [optimizer.state[p].get("compensation", torch.zeros_like(p)) for p in params]
        results.append([p.detach().double() + rest.double() for p, rest in zip(params, lost, strict=True)])
    assert len(calls) == 6
    assert_mostly_close(*results, 2**-15, method)


@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
@EVERY_FUSED
def test_half_the_state(method, state_dtype, calls):
    """Of float32 parameters; the average is as good as bfloat16 is, and the states keep their dtypes."""
    params, wide = GPU.params([(50, 90)]), GPU.params([(50, 90)], torch.float64)
    settings = {"lr": 0.01, "state_dtype": state_dtype, "last_grad_dtype": "bfloat16"}
    optimizer, reference = make(method, params, **settings), make(method, wide, lr=0.01, foreach=True)
    gradients = GPU.gradients(GPU.params([(50, 90)]), 4)
    run_steps(optimizer, params, gradients)
    run_steps(reference, wide, [[g.double() for g in step] for step in gradients])
    (state,), (expected,) = optimizer.state.values(), reference.state.values()
    assert len(calls) == 4
    assert state["last_grad"].dtype == torch.bfloat16
    assert state["exp_avg"].dtype == (torch.float32 if state_dtype is None else torch.bfloat16)
    assert_close([state["exp_avg"]], [expected["exp_avg"]], 2**-6)


@EVERY_FUSED
def test_plain_rounding(method, calls):
    """kahan_sum=False: x is rounded to nearest."""
    params = GPU.params([(50, 90)], torch.bfloat16)
    before = values(params)
    optimizer = make(method, params, lr=1e-6, kahan_sum=False)
    run_steps(optimizer, params, GPU.gradients(params, 2))
    assert len(calls) == 2 and "compensation" not in optimizer.state[params[0]]
    # Only entries next to zero are changed by such small steps.
    assert ((params[0] == before[0]) | (before[0].abs() < 1e-3)).all()


@EVERY_FUSED
def test_the_last_norms_are_known_from_the_second_step_on(method, monkeypatch):
    found = []
    known_norms = gpu._known_norms
    monkeypatch.setattr(gpu, "_known_norms", lambda *args: (found.append(known_norms(*args)), found[-1])[1])
    short_and_clipped(GPU, method, 7)
    assert [norms is None for norms in found] == [True] + [False] * 6
    found.clear()
    short_and_clipped(GPU, method, 7, lambda optimizer: setattr(optimizer, "_last_norms", LastNorms()))
    assert [norms is None for norms in found] == [True] * 7


@EVERY_FUSED
def test_rounding_of_the_last_grad_cannot_hide_a_clip(method):
    """‖g_{t−1}‖ is measured before g_{t−1} is rounded to bfloat16, which lengthens this one as much as can be."""
    (param,) = GPU.params([(64, 64)])
    optimizer = make(method, [param], gamma=0.75, last_grad_dtype="bfloat16")
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
    for composed in ({}, COMPOSED):
        (param,) = GPU.params([(3, 2)])
        optimizer = MarsLion([param], lr=0.01, gamma=0.0, max_norm=None, **composed)
        for value in (1.0, math.inf, 1.0):
            param.grad = torch.full_like(param, value)
            optimizer.step()
        results.append(param.detach().clone())
    assert_equal(*[[result] for result in results])


def test_parameters_of_several_dtypes(calls):
    """Each dtype takes its own launches."""
    params = [
        *GPU.params([(5, 4)], torch.bfloat16),
        *GPU.params([(5, 4), (4, 3)]),
        *GPU.params([(6, 2)], torch.float64),
    ]
    optimizer = MarsAdamW(params, lr=0.01)
    before = values(params)
    run_steps(optimizer, params, GPU.gradients(params, 2))
    assert len(calls) == 2 * 3
    assert all(not torch.equal(p, q) and p.isfinite().all() for p, q in zip(params, before, strict=True))


def test_embeddings_of_shampoo(calls):
    """And 1d parameters, where they need Kahan summation; in float32 plain AdamW is torch's."""
    for dtype, launches in ((torch.float32, 1), (torch.bfloat16, 2)):
        calls.clear()
        embedding, hidden, bias = GPU.params([(5, 4), (4, 4), (4,)], dtype)
        optimizer = MarsShampoo([{"params": [embedding], "kind": "embedding"}, {"params": [hidden, bias]}])
        run_steps(optimizer, [embedding, hidden, bias], GPU.gradients([embedding, hidden, bias], 1))
        assert len(calls) == launches


def test_what_is_not_aligned_is_composed(calls):
    param = torch.nn.Parameter(torch.randn(13, device=DEVICE)[1:].view(4, 3))
    optimizer = MarsAdamW([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert not calls and optimizer.state[param]["exp_avg"].count_nonzero() == 12


def test_a_compensation_of_another_dtype_is_composed(calls):
    """As after ``param.data = param.data.half()``: two bytes each, but other bits."""
    (param,) = GPU.params([(4, 3)], torch.bfloat16)
    optimizer = MarsAdamW([param], lr=1e-3)
    run_steps(optimizer, [param], GPU.gradients([param], 1))
    before = param.detach().double()
    param.data = param.data.half()
    param.grad = None
    run_steps(optimizer, [param], GPU.gradients([param], 1))
    assert len(calls) == 1 and (param.double() - before).abs().max() < 0.01


def test_the_default_dtype_does_not_matter(calls, recwarn):
    """Models are made under ``torch.set_default_dtype(torch.bfloat16)``, and some code leaves it set."""
    (param,) = GPU.params([(4, 3)])
    optimizer = MarsAdamW([param])
    gpu.kernels_for.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        run_steps(optimizer, [param], [[torch.ones_like(param)]])
    finally:
        torch.set_default_dtype(torch.float32)
        gpu.kernels_for.cache_clear()
    assert len(calls) == 1 and not recwarn.list


def test_without_triton_steps_are_composed_and_a_warning_says_so(calls, monkeypatch):
    kernels = f"{gpu.__package__}.triton_kernels"
    monkeypatch.setitem(sys.modules, kernels, None)
    monkeypatch.delattr(kernels, raising=False)
    gpu.kernels_for.cache_clear()
    (param,) = GPU.params([(4, 3)])
    optimizer = MarsAdamW([param])
    try:
        with pytest.warns(UserWarning, match="Triton kernels do not run on .*ModuleNotFoundError"):
            run_steps(optimizer, [param], GPU.gradients([param], 2))
    finally:
        gpu.kernels_for.cache_clear()
    assert not calls and optimizer.state[param]["step"] == 2
