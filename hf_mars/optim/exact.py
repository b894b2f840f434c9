"""The previous point of exact MARS: put the parameters at x_{t−1}, collect ∇f(x_{t−1}, ξ_t), bring x_t back."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .sharding import drop_gathered


@contextlib.contextmanager
def at_previous_point(
    pairs: list[tuple[Tensor, Tensor]], params: list[Tensor], previous_grads: dict[Tensor, Tensor]
) -> Iterator[None]:
    """Inside, parameters hold x_{t−1}; on leaving they are x_t again, bit for bit, also after an exception.

    Args:
        pairs: (parameter, its x_{t−1}) of the parameters that have moved; empty at the first step, where x_0 = x_1.
        params: every parameter whose gradient is set aside on entry and brought back on leaving.
        previous_grads: gradients made inside are added to this mapping, unless the body raises or ``pairs`` is empty.

    The random number generators are put back too: the evaluation that follows sees the same dropout masks (the same
    ξ_t), and the random stream of a run does not depend on whether the previous point was evaluated.
    """
    random_states = _random_states(params)
    set_aside = [_set_aside(param) for param in params]
    swapped: list[tuple[Tensor, Tensor]] = []
    try:
        for pair in pairs:
            _swap(*pair)
            swapped.append(pair)
        drop_gathered(params)
        torch.clear_autocast_cache()  # an autocast region around both evaluations keeps the weights it has cast
        yield
        if pairs:
            _collect(params, previous_grads)
    finally:
        for pair in swapped:
            _swap(*pair)
        drop_gathered(params)
        torch.clear_autocast_cache()
        for param, (grad, values) in zip(params, set_aside, strict=True):
            param.grad = grad if values is None else grad.copy_(values)
        for put_back, state in random_states:
            put_back(state)


@torch.no_grad()
def _swap(a: Tensor, b: Tensor) -> None:
    # By value, since engines and captured graphs keep the address of the parameter's memory.
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)


def _set_aside(param: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Take away the gradient of x_t. Returns it, with a copy of its values where the body may write into it."""
    grad, param.grad = param.grad, None
    return grad, grad.clone() if grad is not None and _is_shared(grad) else None


def _collect(params: list[Tensor], previous_grads: dict[Tensor, Tensor]) -> None:
    for param in params:
        if param.grad is None:
            continue
        if param in previous_grads:
            previous_grads[param].add_(param.grad)
        else:  # ours from here on: nobody else has it once the caller has put .grad back
            previous_grads[param] = param.grad.clone() if _is_shared(param.grad) else param.grad


def _is_shared(grad: Tensor) -> bool:
    """Whether ``grad`` is a view into a buffer that the next backward may fill again (DDP's buckets)."""
    return grad._is_view()


def _random_states(params: list[Tensor]) -> list[tuple[Callable[[Any], Any], Any]]:
    """Every generator that a forward pass may draw from, with its state: a function that puts it back, and the state.

    Python's and NumPy's generators among them: some models draw their masks there (SpecAugment, layer drop).
    """
    states: list[tuple[Callable[[Any], Any], Any]] = [
        (random.setstate, random.getstate()),
        (torch.set_rng_state, torch.get_rng_state()),
    ]
    numpy = sys.modules.get("numpy")  # not loaded, nothing drawn
    if numpy is not None:
        states.append((numpy.random.set_state, numpy.random.get_state()))
    for device in {param.device for param in params if param.device.type not in ("cpu", "meta")}:
        module = torch.get_device_module(device)
        if device.type == "mps":  # one generator, no device argument
            states.append((module.set_rng_state, module.get_rng_state()))
        else:
            states.append((lambda state, m=module, d=device: m.set_rng_state(state, d), module.get_rng_state(device)))
    return states
