"""A step whose gradient is not finite changes nothing: a run with such steps is the run without them, bit for bit."""

import math

import pytest
import torch
from helpers import EVERY_METHOD, METHODS, assert_same_state, make, make_gradients, make_params, run_steps, values
from kernel_helpers import EVERY_EXECUTION, EVERY_FUSED, ON_GPU

from hf_mars import MarsAdamW, MarsLion
from hf_mars.optim import skipping
from hf_mars.optim.kernels import cpu
from hf_mars.optim.sharding import WHOLE, norms_of_wholes

SHAPES = [(4, 3), (3, 5), (6,)]
BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
# Who measures the norm: the caller, the option, the clip.
WAYS = {"told": {"max_norm": None}, "option": {"max_norm": None, "skip_nonfinite": True}, "clip": {"max_norm": 1.0}}
EVERY_WAY = pytest.mark.parametrize("way", WAYS)
SETTINGS = {
    "approx": {"gamma": 0.3},
    "exact": {"gamma": 0.3, "exact": True},
    "plain": {"gamma": 0.0},
    "half the state": {"gamma": 0.3, "state_dtype": "bfloat16", "last_grad_dtype": "bfloat16"},
}
EVERY_SETTING = pytest.mark.parametrize("settings", SETTINGS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


@pytest.fixture
def devices_decide(monkeypatch):
    """As on an accelerator: the host does not know what a norm is, and there is no step in C."""
    monkeypatch.setattr(cpu, "_cpu", None)
    monkeypatch.setattr(skipping, "reads_are_free", lambda tensors: False)


def feed(optimizer, params, gradients, way, *, bad=None, at=(), where=0):
    """Steps with `gradients`; before those with a number in `at` one with a bad number in the `where`-th gradient."""
    exact = any(group["exact"] for group in optimizer.param_groups)
    for t, step in enumerate(gradients):
        for spoilt in [True] * at.count(t) + [False]:
            grads = [g.clone() for g in step]
            if spoilt:
                grads[where].view(-1)[0] = bad
            if exact and optimizer.needs_previous_point:
                with optimizer.previous_point():
                    for p, g in zip(params, step, strict=True):
                        p.grad = 0.9 * g + 0.1 * p.detach()  # a gradient that depends on the point
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            if way == "told":
                optimizer.skip_unless_finite(torch.nn.utils.get_total_norm(grads))
            optimizer.step()
            optimizer.zero_grad()


def two_runs(method, way, settings, dtype, bad, at, where=0, steps=5):
    """The optimizers of a run without and of one with bad steps."""
    optimizers = []
    for some in ((), at):
        params = make_params(SHAPES, dtype=dtype)
        optimizer = make(method, params, weight_decay=0.1, **WAYS[way], **SETTINGS[settings])
        feed(optimizer, params, make_gradients(params, steps, scales=(0.05, 1.0)), way, bad=bad, at=some, where=where)
        optimizers.append((optimizer, params))
    return optimizers


def assert_same_run(left, right):
    assert_same_state(left[0], right[0])
    assert all(torch.equal(a, b) for a, b in zip(values(left[1]), values(right[1]), strict=True))


@BAD
@DTYPES
@EVERY_SETTING
@EVERY_WAY
@EVERY_METHOD
def test_a_bad_step_changes_nothing(method, way, settings, dtype, bad):
    """From the first step on, two in a row, at the end."""
    without, with_bad = two_runs(method, way, settings, dtype, bad, at=(0, 2, 2, 4))
    assert_same_run(with_bad, without)
    assert with_bad[0].skipped_steps == 4 and without[0].skipped_steps == 0


@DTYPES
@EVERY_SETTING
@EVERY_WAY
@EVERY_METHOD
def test_the_device_decides_alike(method, way, settings, dtype, devices_decide):
    without, with_bad = two_runs(method, way, settings, dtype, math.nan, at=(1, 3, 3))
    assert_same_run(with_bad, without)
    assert (with_bad[0].skipped_steps, with_bad[0].skipped_in_a_row) == (3, 0)


@EVERY_METHOD
@pytest.mark.parametrize("way", ["told", "option"])
def test_it_need_not_be_a_matrix(method, way):
    """Nor have a correction: AdamW's parameters stay, and let the others stay."""
    without, with_bad = two_runs(method, way, "approx", torch.float32, math.nan, at=(0, 3), where=2)
    assert_same_run(with_bad, without)


@pytest.mark.parametrize("max_norm", [1.0, None])
@pytest.mark.parametrize("method", METHODS)
def test_where_the_device_skips_the_first_step_the_next_correction_is_that_of_a_zero(method, max_norm, devices_decide):
    """g_0 = 0, for which c_1 = (1+κ) g_1: the host alone could wait for another first gradient."""
    params = make_params([(4, 3)])
    optimizer = make(method, params, gamma=0.3, max_norm=max_norm, skip_nonfinite=True)
    (zero,), *gradients = [[torch.zeros_like(params[0])], *make_gradients(params, 3)]
    feed(optimizer, params, [[torch.full_like(zero, math.nan)], *gradients], "option")
    expected = make_params([(4, 3)])
    reference = make(method, expected, gamma=0.3, max_norm=max_norm)
    if method == "mars_adamw":
        reference.param_groups[0]["lr"] = 0.0
    run_steps(reference, expected, [[zero]])
    if method == "mars_adamw":  # a step that is not taken does not count, either
        reference.param_groups[0]["lr"] = 0.02
        reference.state[expected[0]]["step"].zero_()
    run_steps(reference, expected, gradients)
    torch.testing.assert_close(values(params), values(expected), rtol=1e-12, atol=1e-12)


def test_flags_are_added_up_on_the_device(devices_decide, monkeypatch):
    monkeypatch.setattr(skipping, "FLAGS", 3)
    (param,) = params = make_params([(2, 2)])
    optimizer = MarsAdamW(params)
    total = in_a_row = 0
    for t, bad in enumerate([0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0, 1, 1, 1, 1]):
        param.grad = torch.ones_like(param)
        optimizer.skip_unless_finite(torch.tensor(math.nan if bad else 1.0))
        optimizer.step()
        total, in_a_row = total + bad, in_a_row + 1 if bad else 0
        if t % 5 == 4 or t == 15:
            assert (optimizer.skipped_steps, optimizer.skipped_in_a_row) == (total, in_a_row)


def check_that_they_skip(execution, calls, method):
    finals = []
    for at in ((), (1, 3)):
        params = execution.params()
        optimizer = make(method, params, gamma=0.3, max_norm=0.5, weight_decay=0.1)
        feed(optimizer, params, execution.gradients(params, 4), "clip", bad=math.nan, at=at, where=len(params) - 1)
        finals.append((optimizer, params))
    assert calls
    assert_same_run(*finals)


@EVERY_EXECUTION
@EVERY_FUSED
def test_the_kernels_skip(execution, calls, method):
    """Large tensors, tensors of no elements, a decision of one batch about the others."""
    check_that_they_skip(execution, calls, method)


@pytest.mark.parametrize("execution", [ON_GPU], indirect=True)
@EVERY_FUSED
def test_the_kernels_skip_where_the_device_decides(execution, calls, method, devices_decide):
    check_that_they_skip(execution, calls, method)


# ---- without a norm ----


@EVERY_EXECUTION
@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_lions_momentum_does_not_become_nan(execution, calls, gamma):
    """Nothing is measured; the kernels leave the elements' averages as they are."""
    (param,) = params = execution.params([(8, 8)])
    optimizer = MarsLion(params, lr=0.01, gamma=gamma)
    gradients = execution.gradients(params, 3)
    run_steps(optimizer, params, gradients[:1])
    before = optimizer.state[param]["exp_avg"].clone()
    gradients[1][0][0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    run_steps(optimizer, params, gradients[1:2])
    average = optimizer.state[param]["exp_avg"]
    assert torch.equal(average[0, :3], before[0, :3]) and not torch.equal(average[1], before[1])
    run_steps(optimizer, params, gradients[2:])
    assert calls and param.isfinite().all()


# ---- large numbers ----


@pytest.mark.parametrize("contiguous", [True, False])
def test_norms_of_large_gradients_do_not_overflow(contiguous):
    """Their squares are no float32; strided tensors take the way that accelerators take."""
    base = torch.full((30, 40), 1e19)
    (norm,) = norms_of_wholes([base if contiguous else base[:, ::2]], [WHOLE])
    assert norm.item() == pytest.approx(1e19 * math.sqrt(1200 if contiguous else 600), rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"state_dtype": "bfloat16"}], ids=str)
@EVERY_METHOD
def test_large_gradients_are_clipped(method, options):
    """c̃ is that of the same gradients divided by 1e19."""
    finals = []
    for scale in (1.0, 1e19):
        params = make_params([(40, 30)], dtype=torch.float32)
        gradients = make_gradients(params, 2)
        for step in gradients:
            step[0].mul_(scale)
        run_steps(optimizer := make(method, params, gamma=0.3, max_norm=0.5, **options), params, gradients)
        finals.append(values(params))
        assert optimizer.skipped_steps == 0
    torch.testing.assert_close(*finals, rtol=1e-4, atol=1e-5)


@EVERY_EXECUTION
@EVERY_FUSED
def test_the_kernels_clip_large_gradients(execution, calls, method):
    params = execution.params([(64, 64)])
    optimizer = make(method, params, gamma=0.0, max_norm=0.5)
    run_steps(optimizer, params, [[torch.full_like(params[0], 1e19)]])
    expected = 0.05 * 0.5 / 64
    assert calls and optimizer.skipped_steps == 0
    torch.testing.assert_close(optimizer.state[params[0]]["exp_avg"], torch.full_like(params[0], expected))
