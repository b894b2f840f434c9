"""The previous point of exact MARS: put the parameters at x_{t−1}, collect ∇f(x_{t−1}, ξ_t), bring x_t back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def at_previous_point(pairs: list[tuple[Tensor, Tensor]], params: list[Tensor], previous_grads: dict[Tensor, Tensor]):
    """Inside, parameters hold x_{t−1}; on leaving they are x_t again, bit for bit, also after an exception.

    Args:
        pairs: (parameter, its x_{t−1}); empty at the first step, where x_0 = x_1.
        params: every parameter whose gradient is set aside on entry and brought back on leaving.
        previous_grads: gradients made inside are added to this mapping, unless the body raises.

    The random number generators are put back too: the evaluation that follows sees the same dropout masks (the same
    ξ_t), and the random stream of a run does not depend on whether the previous point was evaluated.
    """
    grads = [param.grad for param in params]
    for param in params:
        param.grad = None
    with _same_random_numbers(params):
        _swap(pairs)
        try:
            yield
            for param, _ in pairs:
                if param.grad is None:
                    continue
                if param in previous_grads:
                    previous_grads[param].add_(param.grad)
                else:
                    # Ours from here on, unless it is a view into a buffer that the next backward fills again (DDP).
                    previous_grads[param] = param.grad.clone() if param.grad._is_view() else param.grad
        finally:
            _swap(pairs)
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad


@torch.no_grad()
def _swap(pairs: list[tuple[Tensor, Tensor]]) -> None:
    # By value, since engines and captured graphs keep the address of the parameter's memory.
    for a, b in pairs:
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)


@contextlib.contextmanager
def _same_random_numbers(params: list[Tensor]) -> Iterator[None]:
    devices = {param.device for param in params if param.device.type not in ("cpu", "meta")}
    with contextlib.ExitStack() as stack:
        for device_type in {device.type for device in devices} or {"cuda"}:  # the CPU's generator is always included
            indices = [device for device in devices if device.type == device_type]
            stack.enter_context(torch.random.fork_rng(devices=indices, device_type=device_type))
        yield
