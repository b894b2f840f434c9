"""The compiled step on CPUs and the Triton kernels on GPUs give what torch's kernels, composed, give.

GPUs' need one, or TRITON_INTERPRET=1, with which test_triton.py runs this file where there is none. What only one of
them is asked is in test_cpu_kernel.py and test_gpu_kernels.py.
"""

import math

import pytest
import torch
from helpers import assert_close, assert_equal, make, run_steps, values
from kernel_helpers import (
    COMPOSED,
    EVERY_EXECUTION,
    EVERY_EXECUTION_AND_THREADS,
    EVERY_FUSED,
    TOLERANCE,
    assert_mostly_close,
    short_and_clipped,
)

from hf_mars.optim import MarsAdamW, MarsLion
from hf_mars.optim.last_grad import LastNorms


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_norm": None},
        {"max_norm": 0.3, "gamma": 0.0},
        {"gamma": 0.5, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.0},
        {"max_norm": None, "gamma": 0.0},
        {"betas": (0.0, 0.0)},
    ],
    ids=str,
)
@EVERY_FUSED
@EVERY_EXECUTION_AND_THREADS
def test_equals_the_composition(execution, method, settings, calls):
    def run(dtype, **composed):
        params = execution.params(dtype=dtype)
        optimizer = make(method, params, **{"lr": 0.01, "weight_decay": 0.1, **settings, **composed})
        scales = (1e-4, 0.1, 1.0)  # some tensors are clipped, some are not
        gradients = execution.gradients(execution.params(), 5, scales=scales)
        final = run_steps(optimizer, params, [[g.to(dtype) for g in step] for step in gradients])
        return final + [state["exp_avg"] for state in optimizer.state.values()]

    expected = run(torch.float64, **COMPOSED)  # whose sums are exact to float32's digits
    torchs_own = method == "mars_adamw" and settings.get("max_norm", 1.0) is None and settings.get("gamma") == 0.0
    for dtype in execution.dtypes:
        calls.clear()
        assert_mostly_close(run(dtype), expected, TOLERANCE[dtype], method)
        assert len(calls) == (0 if torchs_own else 5)


@EVERY_FUSED
@EVERY_EXECUTION
def test_exact_mode(execution, method, calls):
    for dtype in execution.dtypes:
        calls.clear()
        results = []
        for composed in ({}, COMPOSED):
            params = execution.params([(6, 5), (40, 60)], dtype)
            optimizer = make(method, params, lr=0.01, gamma=0.5, exact=True, **composed)
            for t in range(4):
                with optimizer.previous_point():
                    sum(((t + 1) * p**2 + p).sum() for p in params).backward()
                sum(((t + 1) * p**2 + p).sum() for p in params).backward()
                optimizer.step()
                optimizer.zero_grad()
            assert all("last_grad" not in state for state in optimizer.state.values())
            results.append(values(params))
        assert len(calls) == 4
        assert_close(*results, TOLERANCE[dtype])


# ---- what the clip needs to read: where ‖g_t‖ and the known ‖g_{t−1}‖ bound ‖c_t‖ well below max_norm, g_t alone ----


@EVERY_FUSED
@EVERY_EXECUTION_AND_THREADS
def test_knowing_the_last_norm_changes_no_bit(execution, method):
    def forget(optimizer):
        optimizer._last_norms = LastNorms()

    assert_equal(short_and_clipped(execution, method, 7), short_and_clipped(execution, method, 7, forget))


@pytest.mark.parametrize("how", ["in place", "another tensor", "other memory", "state_dict"])
@EVERY_FUSED
@EVERY_EXECUTION
def test_a_last_grad_that_was_changed_is_measured(execution, method, how):
    finals = []
    for composed in ({}, COMPOSED):
        (param,) = params = execution.params([(40, 60)])
        optimizer = make(method, params, lr=0.01, gamma=0.5, **composed)
        gradients = execution.gradients(params, 2, scales=(1e-5,))
        run_steps(optimizer, params, gradients[:1])
        state = optimizer.state[param]
        if how == "in place":
            state["last_grad"].mul_(1e8)
        elif how == "another tensor":
            state["last_grad"] = state["last_grad"] * 1e8
        elif how == "other memory":
            state["last_grad"].data = state["last_grad"] * 1e8
        else:
            saved = optimizer.state_dict()
            saved["state"][0] = {**saved["state"][0], "last_grad": state["last_grad"] * 1e8}
            optimizer.load_state_dict(saved)
        run_steps(optimizer, params, gradients[1:])
        finals.append([*values(params), optimizer.state[param]["exp_avg"]])
        assert finals[-1][1].norm().item() == pytest.approx(0.05, rel=1e-2)  # (1 − β1) max_norm: it was clipped
    assert_close(*finals, 1e-5)


# ---- values that are hard ----


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@EVERY_FUSED
@EVERY_EXECUTION
def test_a_bad_gradient_stays_in_its_entry_and_is_not_remembered(execution, method, bad):
    """Without a norm that tells of it: AdamW's entry is lost, as AdamW's own would be; Lion's goes on as if it were
    not there."""
    finals = []
    for gradient in (bad, 0.0):
        params = execution.params([(30, 20), (5, 4)])
        optimizer = make(method, params, lr=0.01, gamma=0.5, max_norm=None)
        gradients = execution.gradients(params, 3)
        gradients[1][0][2, 3] = gradient
        finals.append(run_steps(optimizer, params, gradients[:2]))
        for param in params:
            last_grad = optimizer.state[param].get("last_grad")
            assert last_grad is None or last_grad.isfinite().all()
    (actual, expected), place = finals, (2, 3)
    assert actual[0][place].isfinite() == (method == "mars_lion")
    actual[0][place] = expected[0][place] = 0
    assert_close(actual, expected, 1e-7)


@EVERY_EXECUTION
def test_the_norm_is_accurate_over_many_elements(execution):
    """A clip factor is the same to seven digits for one element and for two million."""
    lengths = []
    for n in (1, 1 << 21):
        param = torch.nn.Parameter(torch.zeros(n, 1, device=execution.device))
        optimizer = MarsLion([param], lr=0.0, betas=(0.0, 0.99), max_norm=1.0)
        param.grad = torch.full_like(param, 3.0)
        optimizer.step()
        lengths.append(optimizer.state[param]["exp_avg"].double().norm().item())
    assert lengths == pytest.approx([1.0, 1.0], rel=1e-6)


@pytest.mark.parametrize("betas", [(0.95, 0.9999999), (0.9999999, 0.99)], ids=str)
@EVERY_FUSED
@EVERY_EXECUTION
def test_betas_next_to_one(execution, method, betas):
    """1 − β of a β that was rounded to float32 would be off by a fifth."""
    finals = []
    for dtype, composed in ((torch.float32, {}), (torch.float64, COMPOSED)):
        params = execution.params([(6, 5)], dtype)
        optimizer = make(method, params, lr=0.01, betas=betas, gamma=0.0, max_norm=1e6, **composed)
        gradients = execution.gradients(execution.params([(6, 5)], torch.float64), 4)
        run_steps(optimizer, params, [[g.to(dtype) for g in step] for step in gradients])
        finals.append([optimizer.state[params[0]]["exp_avg"], *values(params)])
    assert_close(*finals, 1e-5)


# ---- manners ----


@EVERY_FUSED
@EVERY_EXECUTION
def test_a_state_of_another_shape_is_an_error_and_no_write_beyond_it(execution, method, calls):
    params, other = execution.params([(6, 5)]), execution.params([(3, 5)])
    optimizer, theirs = make(method, params), make(method, other)
    run_steps(theirs, other, execution.gradients(other, 1))
    optimizer.load_state_dict(theirs.state_dict())
    calls.clear()
    with pytest.raises(RuntimeError):
        run_steps(optimizer, params, execution.gradients(params, 1))
    assert not calls


@EVERY_EXECUTION
def test_without_epsilon_a_subnormal_square_is_not_zero(execution, calls):
    """v = 1e-40 in float32: the root of it, flushed to zero, would divide m."""
    finals = []
    for settings in ({}, COMPOSED):
        params = execution.params([(4, 3)])
        optimizer = make("mars_adamw", params, eps=0.0, max_norm=None, **settings)
        gradients = [[torch.full_like(p, 1e-19) for p in params]] * 2
        finals.append([*run_steps(optimizer, params, gradients), optimizer.state[params[0]]["exp_avg_sq"]])
    assert len(calls) == 2
    assert 0 < finals[0][1].max() < torch.finfo(torch.float32).tiny
    assert_close(*finals, 1e-4)  # subnormal numbers have few digits


@EVERY_EXECUTION
def test_a_tensor_without_elements_counts_its_steps(execution, calls):
    """Under ZeRO one t is that of many slices, and may be counted with one that is empty on this rank."""
    params = execution.params([(0, 3), (4, 3)])
    for i in (slice(0, 2), slice(0, 1)):
        optimizer = make("mars_adamw", params[i])
        run_steps(optimizer, params[i], execution.gradients(params[i], 3))
        assert [state["step"].item() for state in optimizer.state.values()] == [3] * len(params[i])
    assert len(calls) == 6


@EVERY_FUSED
@EVERY_EXECUTION
def test_autograd_notices_the_update(execution, method):
    (param,) = execution.params([(3, 2)])
    optimizer = make(method, [param])
    loss = (param**2).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "settings, strided",
    [({}, True), ({"foreach": True}, False), ({"fused": False}, False), ({"max_norm": None, "gamma": 0.0}, False)],
    ids=["strided", "foreach", "not_fused", "AdamW"],
)
@EVERY_EXECUTION
def test_what_it_does_not_take_is_composed(execution, settings, strided, calls):
    (param,) = execution.params([(4, 6) if strided else (4, 3)])
    param = torch.nn.Parameter(param.detach()[:, ::2] if strided else param.detach())
    optimizer = MarsAdamW([param], **settings)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert not calls and optimizer.state[param]["exp_avg"].count_nonzero() == 12
