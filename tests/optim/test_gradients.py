"""Gradients: however they are fed, g_{t-1} is their value, they are left alone, and bad ones are not remembered."""

import pytest
import torch
from helpers import (
    CLASSES,
    EVERY_CLASS,
    EVERY_METHOD,
    assert_equal,
    make,
    make_gradients,
    make_params,
    run_steps,
    values,
)
from torch import nn


def feed_fresh(optimizer, params, gradients):
    run_steps(optimizer, params, gradients)


def feed_zeroed_in_place(optimizer, params, gradients):
    for step in gradients:
        optimizer.zero_grad(set_to_none=False)
        for p, g in zip(params, step, strict=True):
            p.backward(g)  # accumulates into p.grad where there is one
        optimizer.step()


def feed_a_reused_buffer(optimizer, params, gradients):
    for p in params:
        p.grad = torch.empty_like(p)
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad.copy_(g)
        optimizer.step()


def feed_a_swapped_buffer(optimizer, params, gradients):
    """Another gradient object every step, in the same memory: what a bucket's views are."""
    buffers = [torch.empty_like(p) for p in params]
    for step in gradients:
        for p, buffer, g in zip(params, buffers, step, strict=True):
            p.grad = None
            p.grad = buffer.copy_(g).view_as(p)
        optimizer.step()


def feed_then_spoil(optimizer, params, gradients):
    for step in gradients:
        run_steps(optimizer, params, [step])
        for p in params:
            p.grad.fill_(float("nan"))


FEEDS = [feed_zeroed_in_place, feed_a_reused_buffer, feed_a_swapped_buffer, feed_then_spoil]
KERNELS = pytest.mark.parametrize("kernel", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)


@KERNELS
@pytest.mark.parametrize("max_norm", [1.0, None])
@pytest.mark.parametrize("feed", FEEDS)
@EVERY_METHOD
def test_the_last_gradient_is_never_an_alias(method, feed, max_norm, kernel):
    finals = []
    for way in (feed_fresh, feed):
        params = make_params([(4, 3), (2, 3, 4), (6,)])
        optimizer = make(method, params, gamma=0.5, max_norm=max_norm, **kernel)
        way(optimizer, params, make_gradients(params, 12, scales=(0.05, 1.0)))
        finals.append(values(params))
    assert_equal(*finals)
    corrected = make_params([(4, 3), (2, 3, 4), (6,)])
    plain = make(method, corrected, gamma=0.0, max_norm=max_norm, **kernel)
    feed_fresh(plain, corrected, make_gradients(corrected, 12, scales=(0.05, 1.0)))
    assert not torch.equal(corrected[0], finals[0][0])  # the correction matters here


@KERNELS
@pytest.mark.parametrize("max_norm", [0.1, None])
@EVERY_METHOD
def test_step_leaves_gradients_alone(method, max_norm, kernel):
    params = make_params()
    optimizer = make(method, params, weight_decay=0.1, max_norm=max_norm, **kernel)
    for step in make_gradients(params, 3):
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        objects = [p.grad for p in params]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params, objects, strict=True))
        assert_equal([p.grad for p in params], step)


@pytest.mark.parametrize("when", [0, 2])
def test_nonfinite_gradients_are_not_remembered(when):
    """Where nobody has measured a norm, by which the step would have been skipped (test_skipping.py)."""
    params = make_params([(4, 3), (3, 4)], dtype=torch.float32)
    optimizer = make("mars_adamw", params, max_norm=None)
    gradients = make_gradients(params, 4)
    spoilt = gradients[when][0]
    spoilt[0, 0], spoilt[1, 1], spoilt[2, 2] = float("nan"), float("inf"), -float("inf")
    run_steps(optimizer, params, gradients[: when + 1])
    last = optimizer.state[params[0]]["last_grad"]
    assert torch.equal(last, spoilt.nan_to_num(0.0, 0.0, 0.0))
    assert torch.equal(optimizer.state[params[1]]["last_grad"], gradients[when][1])
    run_steps(optimizer, params, gradients[when + 1 :])
    assert torch.equal(optimizer.state[params[0]]["last_grad"], gradients[-1][0])
    assert params[1].isfinite().all()  # the other parameter never noticed


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    for cls in CLASSES:
        optimizer = cls(embedding.parameters())
        embedding(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()


@EVERY_CLASS
def test_complex_parameters_are_refused(cls):
    with pytest.raises(ValueError, match="complex"):
        cls([nn.Parameter(torch.zeros(3, 4, dtype=torch.complex64))])
