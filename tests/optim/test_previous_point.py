"""previous_point(): what it leaves behind, its errors, and what of it a checkpoint holds."""

import contextlib
import copy
import io
import random

import numpy
import pytest
import torch
from exact_helpers import MATRICES, Quadratic, make_exact
from helpers import EVERY_CLASS, EVERY_METHOD, assert_close, assert_equal, make_params, values
from torch import nn

from hf_mars import MarsAdamW

# --- What previous_point() leaves behind


def test_both_evaluations_draw_the_same_and_the_stream_goes_on_unchanged():
    """torch's, Python's and NumPy's generators; also after an exception."""

    def draw():
        return (torch.rand(4).tolist(), random.random(), numpy.random.rand(), dropout(torch.ones(99)).tolist())

    dropout = nn.Dropout(0.5)
    params = make_params()
    optimizer = make_exact("mars_adamw", params)
    problem = Quadratic(params)
    for t in range(3):  # at t = 1 too
        torch.manual_seed(t)
        random.seed(t)
        numpy.random.seed(t)
        expected = [draw(), draw()]
        torch.manual_seed(t)
        random.seed(t)
        numpy.random.seed(t)
        with pytest.raises(ZeroDivisionError), optimizer.previous_point():
            draw()
            1 / 0  # noqa: B018
        with optimizer.previous_point():
            assert [draw(), draw()] == expected
            problem(t).backward()
        assert [draw(), draw()] == expected
        problem(t).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_dropout_adds_no_difference_between_the_evaluations():
    """lr = 0: x_{t−1} = x_t, so with equal masks the correction is zero, and c_t = g_t in spite of κ = 19."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3, bias=False))
    optimizer = MarsAdamW(model.parameters(), lr=0.0, gamma=1.0, exact=True, betas=(0.95, 0.99))
    inputs = torch.randn(4, 6)
    weight = model[0].weight
    average = torch.zeros_like(weight)
    for _ in range(4):
        with optimizer.previous_point():
            model(inputs).sum().backward()
        model(inputs).sum().backward()
        average.lerp_(weight.grad, 1 - 0.95)
        optimizer.step()
        optimizer.zero_grad()
    assert_close([optimizer.state[weight]["exp_avg"]], [average], 1e-6)


def test_inside_parameters_are_the_previous_ones_and_outside_they_and_their_gradients_are_untouched():
    params = make_params(dtype=torch.float32)
    params[0].data.mul_(1e-30)  # a difference and its addition would not give these back
    optimizer = make_exact("mars_adamw", params)
    problem = Quadratic(params)
    addresses = [p.data_ptr() for p in params]
    previous = values(params)
    for t in range(5):
        current = values(params)
        kept = [torch.full_like(p, t) if i % 2 else None for i, p in enumerate(params)]
        for p, grad in zip(params, kept, strict=True):
            p.grad = grad
        with optimizer.previous_point():
            assert_equal(params, previous)
            assert all(p.grad is None for p in params)
            problem(t).backward()
        assert_equal(params, current)
        assert all(
            p.grad is grad and (grad is None or (grad == t).all()) for p, grad in zip(params, kept, strict=True)
        )
        optimizer.zero_grad()
        problem.train(optimizer, [t])
        previous = current
    assert [p.data_ptr() for p in params] == addresses


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_all_is_as_before_and_the_evaluation_can_be_repeated(error):
    finals = []
    for broken in (True, False):
        params = make_params()
        optimizer = make_exact("mars_adamw", params, gamma=0.5)
        problem = Quadratic(params)
        problem.train(optimizer, range(3))
        with optimizer.previous_point():
            problem(3).backward()
        if broken:
            before = values(params)
            with pytest.raises(error), optimizer.previous_point():
                (1e6 * problem(4)).backward()
                raise error
            assert_equal(params, before)
            assert all(p.grad is None for p in params)
        with optimizer.previous_point():
            problem(4).backward()
        problem([3, 4]).backward()
        optimizer.step()
        optimizer.zero_grad()
        problem.train(optimizer, range(5, 8))
        finals.append(values(params))
    assert_equal(*finals)


def test_a_swap_that_fails_halfway_is_undone(monkeypatch):
    """No memory for the copy of a large parameter, say."""
    from hf_mars.optim import exact

    params = make_params()
    optimizer = make_exact("mars_adamw", params)
    Quadratic(params).train(optimizer, range(2))
    before, swap = values(params), exact._Moves.swap
    monkeypatch.setattr(exact, "pieces_of", lambda *lists: ([[t] for t in ts] for ts in zip(*lists, strict=True)))
    failures = [params[4]]

    def swap_without_memory(moves):
        if failures and moves.x[0].data_ptr() == failures[0].data_ptr():
            failures.clear()
            raise torch.OutOfMemoryError
        swap(moves)

    monkeypatch.setattr(exact._Moves, "swap", swap_without_memory)
    with pytest.raises(torch.OutOfMemoryError), optimizer.previous_point():
        raise AssertionError("never entered")
    assert not failures
    assert_equal(params, before)


def test_weights_that_autocast_has_cast_are_not_used_at_the_other_point():
    """One autocast region around both evaluations: its cache of bf16 weights must not outlive the swap."""
    finals = []
    for whole in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(6, 4)
        optimizer = MarsAdamW(model.parameters(), lr=0.1, gamma=1.0, exact=True)
        inputs = torch.randn(8, 6)

        def loss(model=model, inputs=inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return model(inputs).float().square().mean()

        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16) if whole else contextlib.nullcontext():
                with optimizer.previous_point():
                    loss().backward()
                loss().backward()
            optimizer.step()
            optimizer.zero_grad()
        finals.append(values(model.parameters()))
    assert_equal(*finals)


# --- Errors


def test_a_step_without_the_previous_gradient_says_what_to_do_and_changes_nothing():
    params = make_params()
    optimizer = make_exact("mars_adamw", params)
    problem = Quadratic(params)
    problem.train(optimizer, range(2))
    before, state = values(params), copy.deepcopy(optimizer.state_dict()["state"])
    problem(2).backward()
    with pytest.raises(RuntimeError, match=r"previous_point\(\).*MarsTrainer.*exact=False"):
        optimizer.step()
    assert_equal(params, before)
    for i, entries in optimizer.state_dict()["state"].items():
        assert_equal(entries.values(), state[i].values())
    with optimizer.previous_point():
        problem(2).backward()
    optimizer.step()


def test_a_step_uses_the_previous_gradient_up():
    params = make_params()
    optimizer = make_exact("mars_adamw", params)
    problem = Quadratic(params)
    problem.train(optimizer, range(2))
    problem(2).backward()
    with pytest.raises(RuntimeError, match="previous point"):
        optimizer.step()


def test_a_skipped_batch_leaves_nothing_for_the_next_one():
    """zero_grad() drops both gradients; one inside the context only those that are made there."""
    finals = []
    for skip in (True, False):
        params = make_params()
        optimizer = make_exact("mars_adamw", params, gamma=0.5)
        problem = Quadratic(params)
        problem.train(optimizer, range(3))
        if skip:
            with optimizer.previous_point():
                problem(9).backward()
            problem(9).backward()
            optimizer.zero_grad()
            with optimizer.previous_point():
                problem(8).backward()
                optimizer.zero_grad()
                problem(3).backward()
        else:
            with optimizer.previous_point():
                problem(3).backward()
        problem(3).backward()
        optimizer.step()
        finals.append(values(params))
    assert_equal(*finals)


def test_entering_twice():
    params = make_params()
    optimizer = make_exact("mars_adamw", params)
    with optimizer.previous_point():
        with pytest.raises(RuntimeError, match="already entered"), optimizer.previous_point():
            pass
        with pytest.raises(RuntimeError, match="leave the context first"):
            optimizer.step()
    with optimizer.previous_point():
        pass


@EVERY_CLASS
def test_an_optimizer_that_is_not_exact(cls):
    with pytest.raises(RuntimeError, match="exact=True"), cls(make_params(MATRICES)).previous_point():
        pass


# --- State


@EVERY_METHOD
def test_a_run_continues_bit_for_bit_from_its_state(method):
    """Saved after any step, loaded with weights_only into a new optimizer over new parameters; x_{t−1} is in it."""
    whole = make_params(dtype=torch.float32)
    optimizer = make_exact(method, whole, gamma=0.5)
    problem = Quadratic(whole)
    saved = []
    for t in range(6):
        file = io.BytesIO()
        torch.save({"params": values(whole), "optimizer": optimizer.state_dict()}, file)
        saved.append(file)
        problem.train(optimizer, [t])
    for t, file in enumerate(saved):
        file.seek(0)
        checkpoint = torch.load(file, weights_only=True)
        params = [nn.Parameter(value) for value in checkpoint["params"]]
        resumed = make_exact(method, params, gamma=0.5)
        resumed.load_state_dict(checkpoint["optimizer"])
        assert resumed.needs_previous_point == (t > 0)
        Quadratic(params).train(resumed, range(t, 6))
        assert_equal(params, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_previous_point_has_the_parameters_precision(dtype):
    params = make_params(dtype=dtype)
    optimizer = make_exact("mars_adamw", params)
    Quadratic(params).train(optimizer, range(2))
    before = values(params)
    Quadratic(params).train(optimizer, [2])
    assert_equal([optimizer.state[p]["last_param"] for p in params], before)
    assert {state["last_param"].dtype for state in optimizer.state.values()} == {dtype}
