"""What the Triton kernels alone are asked; what the compiled step on CPUs is asked too is in test_kernels.py.

They need a GPU, or TRITON_INTERPRET=1, with which test_triton.py runs this file where there is none.
"""

import copy
import math
import sys
import weakref

import pytest
import torch
from helpers import assert_close, assert_equal, make, run_steps, values
from kernel_helpers import COMPOSED, EVERY_FUSED, EXECUTIONS, NEEDS_GPU, assert_mostly_close, gpu, short_and_clipped

from hf_mars.optim import MarsAdamW, MarsLion, MarsShampoo
from hf_mars.optim.kernels import copies, launch, plan, trial
from hf_mars.optim.last_grad import LastNorms

pytestmark = NEEDS_GPU

GPU = EXECUTIONS["gpu"]
DEVICE = GPU.device


@pytest.fixture
def execution():
    return GPU


@pytest.fixture(autouse=True, scope="module")
def tried():
    """The kernels, once, before tests count what is called."""
    gpu.kernels_for(torch.device(DEVICE))


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
    take = LastNorms.take_vector
    monkeypatch.setattr(LastNorms, "take_vector", lambda *args: (found.append(take(*args)), found[-1])[1])
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
    """One that overflowed, from −3e38 towards 3e38."""
    results = []
    for composed in ({}, COMPOSED):
        (param,) = GPU.params([(3, 2)])
        optimizer = MarsLion([param], lr=0.01, gamma=0.0, max_norm=None, **composed)
        for value in (-3e38, 3e38):
            if param in optimizer.state:
                optimizer.state[param]["exp_avg"].fill_(-3e38)
            param.grad = torch.full_like(param, value)
            before = param.detach().clone()
            optimizer.step()
        assert (param < before).all()
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
    for dtype, launches in ((torch.float32, 2), (torch.bfloat16, 3)):
        calls.clear()
        embedding, hidden, bias = GPU.params([(5, 4), (4, 4), (4,)], dtype)
        optimizer = MarsShampoo([{"params": [embedding], "kind": "embedding"}, {"params": [hidden, bias]}])
        run_steps(optimizer, [embedding, hidden, bias], GPU.gradients([embedding, hidden, bias], 1))
        assert len(calls) == launches


@EVERY_FUSED
def test_one_odd_gradient_keeps_none_of_the_others_from_the_kernels(method, calls):
    """DDP's bucket views: a bias of three elements misaligns all that follow it. Dense in another order than rows, as
    channels_last is, is as good as contiguous; what has gaps, or lies otherwise than its parameter, is composed."""
    shapes = [(4, 3, 2, 2), (3,), (50, 90), (6, 5), (6, 5)]
    finals = []
    for composed in ({}, COMPOSED):
        params = GPU.params(shapes)
        params[0] = torch.nn.Parameter(params[0].detach().to(memory_format=torch.channels_last))
        optimizer = make(method, params, lr=0.01, gamma=0.5, optimize_1d=True, **composed)
        for gradients in GPU.gradients(params, 4, scales=(1e-3, 1.0)):
            bucket = torch.cat([g.flatten() for g in gradients[:4]])
            for param, piece in zip(params, bucket.split([g.numel() for g in gradients[:4]]), strict=False):
                param.grad = piece.as_strided(param.shape, param.stride())
            params[4].grad = gradients[4].mT.contiguous().mT
            optimizer.step()
        finals.append([*values(params), *(optimizer.state[p]["exp_avg"] for p in params)])
    assert [len(batch.params) for batch in calls] == [3, 1] * 4  # matrices but the odd one, and the bias
    assert_mostly_close(*finals, 1e-5, method)


@EVERY_FUSED
def test_groups_with_equal_settings_are_launched_together(method, monkeypatch):
    launches, measure = [], launch.Launch.measure
    monkeypatch.setattr(
        launch.Launch, "measure", lambda self, *args: (launches.append(len(self._table.places)), measure(self, *args))
    )
    params = GPU.params([(4, 3), (3, 5), (5, 4), (2, 2)])
    gradients = GPU.gradients(params, 3, scales=(1e-3, 1.0))
    decays = (0.1, 0.0, 0.1, 0.0)
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(params, decays, strict=True)]
    together = run_steps(make(method, groups, gamma=0.5), params, gradients)
    assert launches == [2, 2] * 3
    params = GPU.params([(4, 3), (3, 5), (5, 4), (2, 2)])
    optimizers = [make(method, [p], weight_decay=decay, gamma=0.5) for p, decay in zip(params, decays, strict=True)]
    for p, optimizer, own in zip(params, optimizers, zip(*gradients, strict=True), strict=True):
        run_steps(optimizer, [p], [[g] for g in own])
    assert_equal(together, values(params))


def test_nothing_is_uploaded_where_nothing_has_moved(monkeypatch):
    """Nor where learning rates change. Of gradients that lie elsewhere their addresses alone are; another set of
    gradients, new states and parameters elsewhere are noticed."""
    uploaded, on_host = [], plan._on_host
    monkeypatch.setattr(plan, "_on_host", lambda data, *args: (uploaded.append(len(data)), on_host(data, *args))[1])
    params, wide = GPU.params([(4, 3), (3, 5)]), GPU.params([(4, 3), (3, 5)])
    optimizer, composed = make("mars_adamw", params), make("mars_adamw", wide, **COMPOSED)

    def step():
        uploaded.clear()
        for param, other in zip(params, wide, strict=True):
            other.grad = param.grad
        optimizer.step()
        composed.step()
        assert_close(params, wide, 1e-5)
        return list(uploaded)

    whole_table = [9 * 4]  # of two tensors
    for param in params:
        param.grad = torch.ones_like(param)
    for lr, expected in ((1e-3, whole_table), (2e-3, []), (0.0, [])):
        for each in (optimizer, composed):
            each.param_groups[0]["lr"] = lr
        assert step() == expected
    kept, params[0].grad = params[0].grad, 2 * torch.ones_like(params[0])
    assert step() == [2]
    assert step() == []
    params[0].grad = None
    assert step() == [9 * 2]  # of one
    params[0].grad = kept
    assert step() == [2]
    for each in (optimizer, composed):
        each.load_state_dict(copy.deepcopy(each.state_dict()))
    assert step() == whole_table
    params[1].data = params[1].data.clone()
    assert step() == whole_table
    assert step() == []
    unaligned = torch.ones(16, device=DEVICE)[1:].view(3, 5)
    params[1].grad = unaligned
    assert step() == [9 * 2] * 2  # a table of what is aligned, and one of the rest


@pytest.mark.parametrize("settings", [{}, {"gamma": 0.0}, {"exact": True}], ids=str)
@pytest.mark.parametrize("method", ["mars_adamw", "mars_shampoo"])
def test_the_composed_clip_is_one_launch_that_leaves_alone_what_is_short(method, settings, monkeypatch):
    """Where norms are on the device. torch divides lists by 0-d tensors in one launch per tensor."""
    finals, divided, divide = [], [], gpu.divide

    def counting(tensors, divisors):
        divided.append(len(tensors))
        divide(tensors, divisors)

    for on_device in (False, True):
        if on_device:
            monkeypatch.setattr("hf_mars.optim.composed.reads_are_free", lambda tensors: False)
            monkeypatch.setattr(torch, "_foreach_div_", None)
            monkeypatch.setattr(gpu, "divide", counting)
        params = GPU.params([(6, 5), (50, 90), (3, 4)])
        optimizer = make(method, params, max_norm=1.0, fused=False, foreach=False, **settings)
        gradients = GPU.gradients(params, 4, scales=(1e-3, 1.0, 0.02))
        finals.append(run_steps(optimizer, params, gradients[: 1 if "exact" in settings else 4]))
        assert divided == ([3] * (1 if "exact" in settings else 4) if on_device else [])
    assert_close(*finals, 1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_dividing_by_nothing_writes_nothing(bad):
    tensors = [torch.full((n,), 2.0, device=DEVICE) for n in (5, 3, launch.BLOCK + 1, 2)]
    tensors.append(torch.full((7,), 2.0, device=DEVICE)[1:])
    tensors[0][1] = bad
    gpu.divide(tensors, torch.tensor([1.0, 4.0, 2.0, math.nan, 8.0], device=DEVICE))
    assert tensors[0].isfinite().sum() == 4 and tensors[3].isnan().all()
    assert [t[0].item() for t in tensors[:3]] == [2.0, 0.5, 1.0] and (tensors[4] == 0.25).all()


def test_replicas_take_the_same_way(calls, monkeypatch):
    """Where the kernels of one rank do not run, none takes them."""
    asked = []
    monkeypatch.setattr(gpu, "all_ranks_can", lambda what, able, *_: (asked.append((what, able)), False)[1])
    params = GPU.params([(5, 4), (6, 5)])
    settings = {"max_norm": 1.0, "process_group": Alone()}
    optimizer = MarsShampoo([{"params": params[:1], "kind": "embedding"}, {"params": params[1:]}], **settings)
    run_steps(optimizer, params, GPU.gradients(params, 3))
    assert not calls and asked == [("Triton kernels", True)] * 6
    assert "Triton does not work on another rank" in optimizer.executions["embedding"]


class Alone:
    """A stand-in for a process group of one."""

    def size(self):
        return 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_exact_mode_moves_all_parameters_in_three_launches(dtype, monkeypatch):
    """To x_{t−1}, back, and x_t kept: 4, 4 and 2 words (test_triton.py). Bit for bit, and uploaded once."""
    taken, uploaded, on_host = [], [], plan._on_host
    swap, keep = copies.swap, copies.keep
    monkeypatch.setattr(copies, "swap", lambda kernels, x, *rest: (taken.append(len(x)), swap(kernels, x, *rest)))
    monkeypatch.setattr(copies, "keep", lambda kernels, x, *rest: (taken.append(-len(x)), keep(kernels, x, *rest)))
    monkeypatch.setattr(plan, "_on_host", lambda data, *args: (uploaded.append(len(data)), on_host(data, *args))[1])
    params = [*GPU.params([(4, 3), (50, 90), (0, 3)], dtype)]
    params.append(torch.nn.Parameter(torch.ones(7, dtype=dtype, device=DEVICE)[1:].view(3, 2)))  # not aligned
    optimizer = MarsAdamW(params, exact=True, gamma=0.5)
    points = []
    for step in range(4):
        before = values(params)
        with optimizer.previous_point():
            if step > 0:
                assert_equal(params, points[-1])
            for p in params:
                p.grad = torch.ones_like(p)
        assert_equal(params, before)
        points.append(before)
        versions = [p._version for p in params]
        for p in params:
            p.grad = torch.ones_like(p)
        uploaded.clear()
        optimizer.step()
        assert all(p._version > version for p, version in zip(params, versions, strict=True))
    assert taken == [4, 4, -4] * 3
    assert max(uploaded, default=0) <= 3  # addresses of gradients, no table


@pytest.mark.parametrize("raised", [0.0, 1.0])
def test_a_flag_decides_whether_the_point_is_kept(raised):
    tensors, others = GPU.params([(4, 3), (50, 90)]), GPU.params([(4, 3), (50, 90)])
    for other in others:
        other.data.fill_(math.nan)
    gpu.keep(tensors, others, torch.tensor(raised, device=DEVICE))
    assert all(torch.equal(a, b) != bool(raised) for a, b in zip(tensors, others, strict=True))


def test_plans_keep_no_state_alive():
    (param,) = GPU.params([(4, 3)])
    optimizer = make("mars_adamw", [param])
    run_steps(optimizer, [param], GPU.gradients([param], 2))
    states = [weakref.ref(value) for value in optimizer.state[param].values()]
    optimizer.state.clear()
    assert not any(reference() is not None for reference in states)


# ---- the first step on a device ----


@pytest.fixture
def anew():
    gpu.kernels_for.cache_clear()
    yield
    gpu.kernels_for.cache_clear()


@pytest.mark.parametrize("wrong", ["parameter", "moving average", "moving average of squares", "last gradient"])
def test_kernels_that_compute_something_else_are_not_used(wrong, anew, calls, monkeypatch):
    differs = trial.what_differs

    def off(batch, expected):
        trial._results(batch)[wrong][1].view(-1)[-1].add_(1e-3)
        return differs(batch, expected)

    monkeypatch.setattr(trial, "what_differs", off)
    (param,) = GPU.params([(4, 3)])
    with pytest.warns(UserWarning, match=f"compute another {wrong} than torch's kernels"):
        run_steps(make("mars_adamw", [param]), [param], GPU.gradients([param], 1))
    assert not calls


def test_an_earlier_error_of_the_device_is_raised_as_what_it_is(anew, monkeypatch):
    """An illegal access by other work is reported by whatever waits for the device next."""

    def synchronize(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in (("get_sync_debug_mode", lambda: 0), ("set_sync_debug_mode", lambda mode: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gpu.kernels_for(torch.device("cuda", 0))


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


def test_the_default_dtype_does_not_matter(anew, calls, recwarn):
    """Models are made under ``torch.set_default_dtype(torch.bfloat16)``, and some code leaves it set."""
    (param,) = GPU.params([(4, 3)])
    optimizer = MarsAdamW([param])
    torch.set_default_dtype(torch.bfloat16)
    try:
        run_steps(optimizer, [param], [[torch.ones_like(param)]])
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(calls) == 1 and not recwarn.list


def test_without_triton_steps_are_composed_and_a_warning_says_so(anew, calls, monkeypatch):
    kernels = f"{gpu.__package__}.triton_update"
    monkeypatch.setitem(sys.modules, kernels, None)
    monkeypatch.delattr(kernels, raising=False)
    (param,) = GPU.params([(4, 3)])
    optimizer = MarsAdamW([param])
    with pytest.warns(UserWarning, match="Triton kernels do not run on .*ModuleNotFoundError"):
        run_steps(optimizer, [param], GPU.gradients([param], 2))
    assert not calls and optimizer.state[param]["step"] == 2
