"""What a step keeps and in which dtype: g_{t-1} without a copy, half-size states, bfloat16 parameters."""

import functools
import io
import weakref

import helpers
import pytest
import torch
from helpers import EVERY_METHOD, assert_close, assert_equal, make_gradients, make_params, run_steps, values
from torch import nn

from hf_mars.optim import MarsAdamW, MarsLion
from hf_mars.optim.last_grad import LastNorms, can_take_over
from hf_mars.optim.sharding import WHOLE, norms_of_wholes

make = functools.partial(helpers.make, weight_decay=0.1)


def backward(params, gradients):
    """Gradients as autograd leaves them."""
    sum((p * g).sum() for p, g in zip(params, gradients, strict=True)).backward()


# --- g_{t-1} without a copy


@pytest.mark.parametrize("max_norm", [1.0, None])
@pytest.mark.parametrize("method", ["mars_adamw", "mars_lion", "mars_shampoo"])
def test_the_gradients_memory_is_taken_over(method, max_norm):
    params = make_params([(16, 8)], dtype=torch.float32)
    optimizer = make(method, params, max_norm=max_norm)
    for gradients in make_gradients(params, 3):
        backward(params, gradients)
        address = params[0].grad.untyped_storage()._cdata, torch._C._data_address(params[0].grad)
        optimizer.step()
        if "last_grad" in optimizer.state[params[0]]:
            last_grad = optimizer.state[params[0]]["last_grad"]
            assert torch._C._is_cow_tensor(last_grad)
            assert torch._C._data_address(last_grad) == address[1]
        else:
            assert method != "mars_adamw" and max_norm is None
        optimizer.zero_grad(set_to_none=True)


def view_of_a_bucket(values):
    return torch.cat([values.flatten(), values.new_zeros(3)])[: values.numel()].view(values.shape)


def with_an_alias(values):
    values = values.clone()
    with_an_alias.kept = values.data
    return values


def with_an_array(values):
    values = values.clone()
    with_an_array.kept = values.numpy()
    return values


def of_an_array(values):
    return torch.from_numpy(values.numpy().copy())


def exported(values):
    values = values.clone()
    exported.kept = torch.utils.dlpack.from_dlpack(values.__dlpack__())
    return values


def part_of_a_larger_memory(values):
    larger = values.new_zeros(values.numel() + 5)
    larger[: values.numel()] = values.flatten()
    return larger.resize_(values.shape)


def in_shared_memory(values):
    return values.clone().share_memory_()


SHARED = [
    view_of_a_bucket,
    with_an_alias,
    with_an_array,
    of_an_array,
    exported,
    part_of_a_larger_memory,
    in_shared_memory,
]


@pytest.mark.parametrize("gradient_of", SHARED, ids=lambda f: f.__name__)
def test_memory_that_others_may_write_to_is_copied(gradient_of):
    """Writes through the other way into the memory, after step(), must not reach g_{t-1}."""
    params = make_params([(4, 3)], dtype=torch.float32)
    optimizer = MarsAdamW(params, gamma=0.5)
    first = make_gradients(params, 1)[0][0]
    params[0].grad = gradient_of(first)
    assert not can_take_over(params[0].grad)
    optimizer.step()
    kept = getattr(gradient_of, "kept", None)
    with torch.no_grad():
        if isinstance(kept, torch.Tensor):
            kept.fill_(7.0)
        elif kept is not None:
            kept[:] = 7.0
        params[0].grad.fill_(7.0)
    assert torch.equal(optimizer.state[params[0]]["last_grad"], first)


def test_a_gradient_of_autograd_can_be_taken_over():
    """The other half of the proof: otherwise the test above would pass for a function that always says no."""
    param = nn.Parameter(torch.ones(4, 3))
    (param**2).sum().backward()
    assert can_take_over(param.grad)
    own_name = param.grad  # a second name in Python is no second owner: writes through it are noticed
    assert can_take_over(own_name)


def write_in_place(param):
    param.grad.mul_(3.0)


def accumulate(param):
    (param * 5.0).sum().backward()


def write_through_an_array(param):
    param.grad.numpy()[:] = 7.0


def write_through_a_view(param):
    param.grad.view(-1)[1:3] = 7.0


def write_through_foreach(param):
    torch._foreach_add_([param.grad], 1.0)


WRITES = [write_in_place, accumulate, write_through_an_array, write_through_a_view, write_through_foreach]


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_later_writes_do_not_reach_what_was_taken_over(write):
    param = nn.Parameter(torch.ones(4, 3))
    optimizer = MarsAdamW([param], gamma=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        (param * 2.0).sum().backward()
        optimizer.step()
    assert torch._C._is_cow_tensor(optimizer.state[param]["last_grad"])
    write(param)
    assert torch.equal(optimizer.state[param]["last_grad"], torch.full((4, 3), 2.0))
    assert not torch.equal(param.grad, torch.full((4, 3), 2.0))


# --- dtypes


def dtypes_of(optimizer, param):
    return {key: value.dtype for key, value in optimizer.state[param].items() if value.ndim}


@EVERY_METHOD
@pytest.mark.parametrize("named", [torch.bfloat16, "bfloat16"], ids=str)
def test_last_grad_dtype(method, named):
    """g_{t-1} is rounded to bfloat16 (relative error 2^-9) and nothing else is. Unclipped m_t is linear in it."""
    results = []
    for last_grad_dtype in (None, named):
        params = make_params([(6, 4), (4, 6)], dtype=torch.float32)
        optimizer = make(method, params, gamma=0.2, max_norm=1e9, last_grad_dtype=last_grad_dtype)
        gradients = make_gradients(params, 4)
        run_steps(optimizer, params, gradients)
        results.append([optimizer.state[p]["exp_avg"] for p in params])
    assert dtypes_of(optimizer, params[0])["last_grad"] == torch.bfloat16
    assert torch.equal(optimizer.state[params[0]]["last_grad"], gradients[-1][0].bfloat16())
    assert all(dtype == torch.float32 for key, dtype in dtypes_of(optimizer, params[0]).items() if key != "last_grad")
    kappa = 0.2 * 0.95 / 0.05
    for i, (exact, rounded) in enumerate(zip(*results, strict=True)):
        largest = sum(0.05 * kappa * 2**-9 * step[i].norm() for step in gradients)
        assert 0 < (exact - rounded).norm() < largest


@EVERY_METHOD
@pytest.mark.parametrize("param_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_state_dtype_and_its_round_trip(method, param_dtype, state_dtype):
    """torch's load_state_dict casts states to the parameter's dtype; ours come back as they were."""
    params = make_params([(6, 4), (4,)], dtype=param_dtype)
    gradients = make_gradients(params, 12)
    optimizer = make(method, params, state_dtype=state_dtype, last_grad_dtype="float32")
    run_steps(optimizer, params, gradients[:6])
    expected = {key: getattr(torch, state_dtype) for key in ("exp_avg", "exp_avg_sq")}
    expected |= {"last_grad": torch.float32, "compensation": torch.bfloat16}
    for p in params:
        assert all(expected[key] == dtype for key, dtype in dtypes_of(optimizer, p).items())
    assert ("compensation" in optimizer.state[params[0]]) == (param_dtype == torch.bfloat16)

    file = io.BytesIO()
    torch.save({"params": values(params), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    copies = [nn.Parameter(p) for p in saved["params"]]
    resumed = make(method, copies, state_dtype=state_dtype, last_grad_dtype="float32")
    resumed.load_state_dict(saved["optimizer"])
    assert [dtypes_of(resumed, p) for p in copies] == [dtypes_of(optimizer, p) for p in params]
    assert_equal(run_steps(resumed, copies, gradients[6:]), run_steps(optimizer, params, gradients[6:]))


@EVERY_METHOD
@pytest.mark.parametrize("kahan_sum, follows", [(None, True), (True, True), (False, False)])
def test_bfloat16_parameters_follow_float32(method, kahan_sum, follows):
    """At a fine-tuning learning rate most updates are below half a bfloat16's spacing: rounding loses them."""
    steps, lr = 200, 1e-4
    wide = make_params([(16, 16), (16, 8)], dtype=torch.float32, seed=3)
    narrow = [nn.Parameter(p.detach().bfloat16()) for p in wide]
    with torch.no_grad():
        for p, q in zip(wide, narrow, strict=True):
            p.copy_(q)
    start = values(wide)
    options = {"lr": lr, "weight_decay": 0.0}
    ideal = make(method, wide, **options)
    ours = make(method, narrow, kahan_sum=kahan_sum, state_dtype="float32", **options)
    for step in make_gradients(wide, steps, scales=(0.1,)):
        for p, q, g in zip(wide, narrow, step, strict=True):
            g = (g + 0.1).bfloat16()
            p.grad, q.grad = g.float(), g
        ideal.step()
        ours.step()
    for p, q, s in zip(wide, narrow, start, strict=True):
        moved, error = (p - s).norm(), (p - q.float()).norm()
        # bfloat16 itself cannot say it better than to half its spacing
        rounding = (p - p.bfloat16().float()).norm()
        assert (error < 0.05 * moved + 1.2 * rounding) == follows


def test_states_default_to_the_parameters_dtype():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        params = make_params([(4, 3)], dtype=dtype)
        optimizer = MarsLion(params, max_norm=1.0)
        run_steps(optimizer, params, make_gradients(params, 2))
        assert set(dtypes_of(optimizer, params[0]).values()) == {dtype}


@pytest.mark.parametrize("kahan_sum", [None, False])
def test_squares_do_not_vanish_in_float16(kahan_sum):
    """1e-5 squared is nothing there, and m / eps would be a step of a thousand learning rates."""
    params = make_params([(4, 3), (5,)], dtype=torch.float16)
    before = values(params)
    optimizer = MarsAdamW(params, lr=2e-2, lr_1d=2e-2, adjust_lr_fn="original", kahan_sum=kahan_sum)
    run_steps(optimizer, params, [[torch.full_like(p, 1e-5) for p in params]])
    for param, start in zip(params, before, strict=True):
        assert dtypes_of(optimizer, param)["exp_avg_sq"] == torch.float32
        assert_close([param.float()], [start.float() - 2e-2], 2e-3)
    again = MarsAdamW(params, kahan_sum=kahan_sum)
    again.load_state_dict(optimizer.state_dict())
    assert dtypes_of(again, params[0]) == dtypes_of(optimizer, params[0])


@pytest.mark.parametrize("setting", ["state_dtype", "last_grad_dtype"])
@pytest.mark.parametrize("value", ["float16", torch.float16, "half", torch.int8, 16])
def test_other_dtypes_are_refused(setting, value):
    with pytest.raises(ValueError, match=rf"{setting} must be float32, bfloat16 or None, got .*"):
        MarsAdamW(make_params(), **{setting: value})


@EVERY_METHOD
def test_pieces_are_the_whole(method, monkeypatch):
    """Where copies are needed, parameters are updated piece by piece: the result does not depend on the pieces."""
    finals = []
    for elements in (1, 60, 1 << 24):
        monkeypatch.setattr("hf_mars.optim.composed.COPIED_AT_A_TIME", elements)
        params = make_params([(6, 4), (4, 6), (5, 5), (7,)], dtype=torch.bfloat16)
        finals.append(run_steps(make(method, params), params, make_gradients(params, 5)))
    assert_equal(finals[0], finals[2])
    assert_equal(finals[1], finals[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("contiguous", [True, False])
def test_norms_of_half_precisions_are_float32(contiguous, dtype):
    """Strided tensors take the way that accelerators take. 300² is no float16; 256 + 1 is no bfloat16."""
    base = torch.full((300, 300), 1.0, dtype=dtype)
    part = base if contiguous else base[:, ::2]
    (norm,) = norms_of_wholes([part], [WHOLE])
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(part.numel() ** 0.5, rel=1e-6)
    assert norm.square().item() == pytest.approx(part.numel(), rel=1e-6)


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
