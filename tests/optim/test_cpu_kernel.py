"""The compiled step (optim/_cpu.c) gives what torch's kernels, composed, give."""

import math
import weakref

import pytest
import torch
from helpers import assert_close, assert_equal, make_gradients, make_params, run_steps, values

from hf_mars.optim import MarsAdamW, MarsLion, cpu
from hf_mars.optim.last_grad import LastNorms

METHODS = {"mars_adamw": MarsAdamW, "mars_lion": MarsLion}
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)

# Sizes: nothing, one element, less and more than the vector loops take at once, and more than is updated together.
SHAPES = [(0, 3), (1, 1), (3, 7), (4097, 5), (1500, 1500), (70, 64), (8, 3, 5)]


def without(monkeypatch):
    """As where the package was installed without a C compiler."""
    monkeypatch.setattr(cpu, "_cpu", None)


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch):
    """Counts the compiled steps."""
    counted = []
    step = cpu.step
    monkeypatch.setattr(cpu, "step", lambda *args, **kwargs: (counted.append(1), step(*args, **kwargs))[1])
    return counted


def test_it_is_built():
    """Here, where the tests run; elsewhere a step without it is slower and as right."""
    assert cpu.is_compiled()


def test_the_trainer_says_where_it_is_missing(monkeypatch, caplog, tmp_path):
    from transformers import TrainingArguments

    from hf_mars.trainer.options import optimizer_cls_and_kwargs

    caplog.set_level("WARNING", "hf_mars")
    args = TrainingArguments(str(tmp_path), optim="mars_adamw", use_cpu=True)
    optimizer_cls_and_kwargs(args, None)
    assert "compiled step of hf_mars is missing" not in caplog.text
    without(monkeypatch)
    optimizer_cls_and_kwargs(args, None)
    assert "compiled step of hf_mars is missing" in caplog.text


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
@EVERY_METHOD
def test_equals_the_composition(method, settings, threads, calls):
    results = []
    for dtype in (torch.float32, torch.float64):  # which is composed, and whose sums are exact to float32's digits
        params = make_params(SHAPES, dtype=dtype)
        optimizer = METHODS[method](params, **{"lr": 0.01, "weight_decay": 0.1, **settings})
        scales = (1e-4, 0.1, 1.0)  # some tensors are clipped, some are not
        gradients = [[g.to(dtype) for g in step] for step in make_gradients(make_params(SHAPES), 5, scales=scales)]
        results.append(run_steps(optimizer, params, gradients))
        results[-1] += [state["exp_avg"] for state in optimizer.state.values()]
    torchs_own = method == "mars_adamw" and settings.get("max_norm", 1.0) is None and settings.get("gamma") == 0.0
    assert len(calls) == (0 if torchs_own else 5)
    for actual, expected in zip(*results, strict=True):
        if actual.numel() == 0:
            continue
        differ = (actual - expected).abs() > 1e-5 * expected.abs().max()
        # Lion's sign makes a whole step of a rounding error, where a momentum is next to zero.
        assert differ.sum().item() <= (1e-4 * actual.numel() if method == "mars_lion" else 0)


@EVERY_METHOD
def test_exact_mode(method, calls, monkeypatch):
    results = []
    for built in (True, False):
        if not built:
            without(monkeypatch)
        params = make_params([(6, 5), (40, 3)], dtype=torch.float32)
        optimizer = METHODS[method](params, lr=0.01, gamma=0.5, exact=True)
        for t in range(4):
            for point in (optimizer.previous_point, None):
                loss = sum(((t + 1) * p**2 + p).sum() for p in params)
                if point is None:
                    loss.backward()
                    continue
                with point():
                    sum(((t + 1) * p**2 + p).sum() for p in params).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(values(params))
    assert len(calls) == 4
    assert_close(*results, 1e-5)


# ---- what the clip needs to read: where ‖g_t‖ and the known ‖g_{t−1}‖ bound ‖c_t‖ well below max_norm, g_t alone ----


@EVERY_METHOD
def test_knowing_the_last_norm_changes_no_bit(method, threads):
    """Short gradients, then one that is clipped, which the last norm did not announce, then one that it did, …"""
    finals = []
    for forgetful in (False, True):
        params = make_params(SHAPES, dtype=torch.float32)
        optimizer = METHODS[method](params, lr=0.01, gamma=0.5)
        for gradients in make_gradients(params, 7, scales=(1e-5, 1e-5, 3.0, 3.0, 1e-5)):
            run_steps(optimizer, params, [gradients])
            if forgetful:
                optimizer._last_norms = LastNorms()
        finals.append(values(params))
    assert_equal(*finals)


@EVERY_METHOD
def test_short_gradients_are_corrected_without_a_pass_of_their_own(method):
    """Seen by g_{t−1}'s memory: c_t takes it where c_t has to be measured."""
    (param,) = params = make_params([(40, 30)], dtype=torch.float32)
    optimizer = METHODS[method](params, gamma=0.5)
    overwritten = []
    for seed, scale in enumerate((1e-5, 1e-5, 3.0, 3.0, 1e-5, 1e-5)):
        last_grad = optimizer.state[param].get("last_grad")
        before = None if last_grad is None else last_grad.clone()
        run_steps(optimizer, params, make_gradients(params, 1, scales=(scale,), seed=seed))
        overwritten.append(before is not None and not torch.equal(last_grad, before))
    assert overwritten == [False, False, True, True, True, False]


@pytest.mark.parametrize("how", ["in place", "another tensor", "other memory", "state_dict"])
@EVERY_METHOD
def test_a_last_grad_that_was_changed_is_measured(method, how, monkeypatch):
    finals = []
    for built in (True, False):
        if not built:
            without(monkeypatch)
        (param,) = params = make_params([(40, 30)], dtype=torch.float32)
        optimizer = METHODS[method](params, lr=0.01, gamma=0.5)
        gradients = make_gradients(params, 2, scales=(1e-5,))
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
        assert finals[-1][1].norm() == pytest.approx(0.05, rel=1e-2)  # (1 − β1) max_norm: it was clipped
    assert_close(*finals, 1e-5)


def test_norms_are_known_once_and_keep_nothing_alive():
    norms, last_grads = LastNorms(), [torch.ones(3), torch.ones(2)]
    norms.remember(last_grads, [1.0, 2.0])
    assert norms.take(last_grads) == [1.0, 2.0]
    assert norms.take(last_grads) == [None, None]
    norms.remember(last_grads, [1.0, 2.0])
    watched = weakref.ref(last_grads[0])
    del last_grads[0]
    assert watched() is None
    norms.distrust()  # where a captured graph writes to them
    assert norms.take(last_grads) == [None]
    norms.remember(last_grads, [1.0])
    assert norms.take(last_grads) == [None]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("max_norm", [1.0, None])
@EVERY_METHOD
def test_a_bad_gradient_is_bad_in_the_same_entries_and_is_not_remembered(method, max_norm, bad, monkeypatch):
    results = []
    for built in (True, False):
        if not built:
            without(monkeypatch)
        params = make_params([(30, 20), (5, 4)], dtype=torch.float32)
        optimizer = METHODS[method](params, lr=0.01, gamma=0.5, max_norm=max_norm)
        gradients = make_gradients(params, 3)
        gradients[1][0][2, 3] = bad
        results.append(run_steps(optimizer, params, gradients[:2]))
        for param in params:
            last_grad = optimizer.state[param].get("last_grad")
            assert last_grad is None or last_grad.isfinite().all()
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual.isfinite(), expected.isfinite())
        assert_close([actual.nan_to_num(posinf=0, neginf=0)], [expected.nan_to_num(posinf=0, neginf=0)], 1e-5)


@EVERY_METHOD
def test_an_elements_result_does_not_depend_on_its_address(method):
    """Else a resumed run would not be the same run bit for bit: memory lies elsewhere there."""
    finals = []
    for offset in range(17):
        (values_,), step = make_params([(37, 5)], dtype=torch.float32), make_gradients(make_params([(37, 5)]), 4)
        memory = torch.zeros(values_.numel() + offset)
        param = torch.nn.Parameter(memory[offset:].view(37, 5).copy_(values_.detach()))
        optimizer = METHODS[method]([param], lr=0.01, weight_decay=0.1, gamma=0.5)
        for (gradient,) in step:
            param.grad = torch.zeros(gradient.numel() + offset)[offset:].view(37, 5).copy_(gradient)
            optimizer.step()
        finals.append(param.detach().clone())
    assert all(torch.equal(final, finals[0]) for final in finals)


def test_the_norm_is_accurate_over_many_elements():
    """A clip factor is the same to seven digits for one element and for two million."""
    values = []
    for n in (1, 1 << 21):
        param = torch.nn.Parameter(torch.zeros(n, 1))
        optimizer = MarsLion([param], lr=0.0, betas=(0.0, 0.99))
        param.grad = torch.full_like(param, 3.0)
        optimizer.step()
        values.append(optimizer.state[param]["exp_avg"].double().norm().item())
    assert values == pytest.approx([1.0, 1.0], rel=1e-6)


@pytest.mark.parametrize("betas", [(0.95, 0.9999999), (0.9999999, 0.99)], ids=str)
@EVERY_METHOD
def test_betas_next_to_one(method, betas):
    """1 − β of a β that was rounded to float32 would be off by a fifth."""
    finals = []
    for dtype in (torch.float32, torch.float64):
        params = make_params([(6, 5)], dtype=dtype)
        optimizer = METHODS[method](params, lr=0.01, betas=betas, gamma=0.0, max_norm=1e6)
        gradients = [[g.to(dtype) for g in step] for step in make_gradients(make_params([(6, 5)]), 4)]
        run_steps(optimizer, params, gradients)
        finals.append([optimizer.state[params[0]][key] for key in ("exp_avg",)] + values(params))
    assert_close(*finals, 1e-5)


@EVERY_METHOD
def test_a_state_of_another_shape_is_an_error_and_no_write_beyond_it(method, calls):
    params = make_params([(6, 5)], dtype=torch.float32)
    other = make_params([(3, 5)], dtype=torch.float32)
    optimizer, theirs = METHODS[method](params), METHODS[method](other)
    run_steps(theirs, other, make_gradients(other, 1))
    optimizer.load_state_dict(theirs.state_dict())
    calls.clear()
    with pytest.raises(RuntimeError):
        run_steps(optimizer, params, make_gradients(params, 1))
    assert not calls


@EVERY_METHOD
def test_autograd_notices_the_update(method):
    param = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = METHODS[method]([param])
    loss = (param**2).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "make",
    [
        lambda: ([torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))], {}),
        lambda: ([torch.nn.Parameter(torch.randn(3, 4).mT)], {}),
        lambda: ([torch.nn.Parameter(torch.randn(4, 3))], {"last_grad_dtype": "bfloat16"}),
        lambda: ([torch.nn.Parameter(torch.randn(4, 3))], {"foreach": True}),
        lambda: ([torch.nn.Parameter(torch.randn(4, 3))], {"fused": False}),
    ],
    ids=["float64", "strided", "last_grad_dtype", "foreach", "not_fused"],
)
def test_what_it_does_not_take_is_composed(make, calls):
    params, settings = make()
    optimizer = MarsAdamW(params, **settings)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert not calls and optimizer.state[params[0]]["exp_avg"].count_nonzero() == 12
