"""The previous point of exact MARS: put the parameters at x_{t−1}, collect ∇f(x_{t−1}, ξ_t), bring x_t back."""

from __future__ import annotations

import contextlib
import functools
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .algorithm.lion import pieces_of
from .form import kappa_of
from .groups import Group
from .kernels import gpu
from .sharding import Part, drop_gathered, part_of
from .skipping import Skip


class PreviousPoint:
    """∇f(x_{t−1}, ξ_t) for the coming step of one optimizer, and whether the parameters are at x_{t−1} just now.

    x_{t−1} itself is state ("last_param"), so that it is saved.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drop the gradients made at x_{t−1}."""
        self._grads: dict[Tensor, Tensor] = {}
        self._is_evaluated = False
        self._is_entered = False

    @property
    def is_entered(self) -> bool:
        """Whether the parameters are at x_{t−1}."""
        return self._is_entered

    @property
    def grads(self) -> Mapping[Tensor, Tensor]:
        """∇f(x_{t−1}, ξ_t) by parameter; without an entry, a parameter took no part in the batch."""
        return self._grads

    def is_needed(self, groups: list[Group], state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether the next step needs gradients at x_{t−1}: exact mode, κ > 0, and not t = 1, where x_0 = x_1."""
        exact = [group for group in groups if group["exact"]]
        return any(kappa_of(group) > 0 for group in exact) and any(
            "last_param" in state.get(param, {}) for group in exact for param in group["params"]
        )

    @contextlib.contextmanager
    def enter(self, groups: list[Group], state: Mapping[Tensor, dict[str, Any]]) -> Iterator[None]:
        """Inside, the parameters of exact groups hold x_{t−1}; see `Mars.previous_point`."""
        exact = [group for group in groups if group["exact"]]
        if not exact:
            raise RuntimeError("previous_point() needs an optimizer made with exact=True")
        if self._is_entered:
            raise RuntimeError("previous_point() is already entered; leave it before entering it again")
        moved = [moves for group in exact for moves in _moves_of(group, state)]
        params = [param for group in groups for param in group["params"]]
        self._is_entered = True
        try:
            with _at_previous_point(moved, params, self._grads):
                yield
            self._is_evaluated = bool(moved)
        finally:
            self._is_entered = False

    def check(self, groups: list[Group], state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Raise a RuntimeError where step() could not do the right thing, before it changes anything."""
        if self._is_entered:
            raise RuntimeError(
                "step() inside previous_point(): the parameters are at x_{t−1}; leave the context first"
            )
        if self._is_evaluated or not self.is_needed(groups, state):
            return
        corrected = [group for group in groups if group["exact"] and kappa_of(group) > 0]
        if any(param.grad is not None for group in corrected for param in group["params"]):
            raise RuntimeError(
                "exact=True needs the gradient at the previous point before step(): evaluate the same batch in "
                "`with optimizer.previous_point():` first (MarsTrainer does it by itself; zero_grad() drops what was "
                "evaluated, so call it after step()), or use exact=False"
            )

    def gradients(self, params: list[Tensor], parts: list[Part], grads: list[Tensor]) -> list[Tensor]:
        """∇f(x_{t−1}, ξ_t) of this process's parts of `params`; `grads` are theirs of g_t."""
        if not self._is_evaluated:
            return [grad.clone() for grad in grads]  # x_0 = x_1
        # No gradient there: the parameter took no part in this batch at x_{t−1} (an expert not routed to).
        return [
            part.of(self._grads[param]) if param in self._grads else torch.zeros_like(grad)
            for param, part, grad in zip(params, parts, grads, strict=True)
        ]

    def keep(self, groups: list[Group], state: Mapping[Tensor, dict[str, Any]], skip: Skip) -> None:
        """Keep x_t of exact groups, which this step moves away from. Parameters left alone have x_{t+1} = x_t.

        A step that changes nothing leaves x_{t−1} as it is.
        """
        for group in groups:
            if not group["exact"]:
                continue
            for moves in _moves_of(group, state):
                moves.keep(skip.flag(moves.x[0].device))
            for param in group["params"]:
                if param.grad is not None and "last_param" not in state.get(param, {}):
                    state[param]["last_param"] = param.detach().clone(memory_format=torch.preserve_format)


class _Moves:
    """This process's parts of parameters and of their x_{t−1}: plain tensors of one dtype on one device.

    By value, since engines and captured graphs keep the address of the parameter's memory.
    """

    def __init__(self, x: list[Tensor], last_x: list[Tensor], *, by_kernels: bool):
        self.x, self.last_x = x, last_x
        self._by_kernels = by_kernels and gpu.takes([*x, *last_x])

    def pieces(self) -> Iterator[_Moves]:
        """The same in pieces that can be swapped each: not more memory is taken than for one."""
        if self._by_kernels:
            yield self
        else:
            for x, last_x in pieces_of([x.detach() for x in self.x], self.last_x):
                yield _Moves(x, last_x, by_kernels=False)

    @torch.no_grad()
    def swap(self) -> None:
        if self._by_kernels:
            gpu.swap(self.x, self.last_x)
            return
        kept = [torch.empty_like(x) for x in self.x]
        torch._foreach_copy_(kept, self.x)
        torch._foreach_copy_(self.x, self.last_x)
        torch._foreach_copy_(self.last_x, kept)

    def keep(self, flag: Tensor | None) -> None:
        """x in the place of x_{t−1}, unless `flag` is raised."""
        if self._by_kernels:
            gpu.keep(self.x, self.last_x, flag)
        elif flag is None:
            torch._foreach_copy_(self.last_x, self.x)
        else:
            for x, last_x in zip(self.x, self.last_x, strict=True):
                last_x.copy_(torch.where(flag > 0, last_x, x))


@torch.no_grad()
def _moves_of(group: Group, state: Mapping[Tensor, dict[str, Any]]) -> list[_Moves]:
    """Of the parameters that have an x_{t−1}."""
    alike: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Tensor]]] = {}
    for param in group["params"]:
        last_param = state.get(param, {}).get("last_param")
        if last_param is not None:
            part = part_of(param)
            alike.setdefault((param.dtype, param.device), []).append((part.of(param), part.of(last_param)))
    by_kernels = bool(group["foreach"] is None and group["fused"])
    return [_Moves(*map(list, zip(*pairs, strict=True)), by_kernels=by_kernels) for pairs in alike.values()]


@contextlib.contextmanager
def _at_previous_point(
    moved: list[_Moves], params: list[Tensor], previous_grads: dict[Tensor, Tensor]
) -> Iterator[None]:
    """Inside, parameters hold x_{t−1}; on leaving they are x_t again, bit for bit, also after an exception.

    Args:
        moved: of the parameters that have moved; empty at the first step, where x_0 = x_1.
        params: every parameter whose gradient is set aside on entry and brought back on leaving.
        previous_grads: gradients made inside are added to this mapping, unless the body raises or `moved` is empty.

    The random number generators are put back too: the evaluation that follows sees the same dropout masks (the same
    ξ_t), and the random stream of a run does not depend on whether the previous point was evaluated.
    """
    random_states = _random_states(params)
    set_aside = [_set_aside(param) for param in params]
    swapped: list[_Moves] = []
    try:
        for piece in (piece for moves in moved for piece in moves.pieces()):
            piece.swap()
            swapped.append(piece)
        drop_gathered(params)
        torch.clear_autocast_cache()  # an autocast region around both evaluations keeps the weights it has cast
        yield
        if moved:
            _collect(params, previous_grads)
    finally:
        for piece in swapped:
            piece.swap()
        drop_gathered(params)
        torch.clear_autocast_cache()
        for param, (grad, values) in zip(params, set_aside, strict=True):
            param.grad = grad if grad is None or values is None else grad.copy_(values)
        for put_back, state in random_states:
            put_back(state)


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
    """Whether `grad` is a view into a buffer that the next backward may fill again (DDP's buckets)."""
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
            put_back = functools.partial(module.set_rng_state, device=device)
            states.append((put_back, module.get_rng_state(device)))
    return states
