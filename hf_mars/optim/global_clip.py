"""The clip by the norm of all gradients together, as a factor that step() takes along: gradients stay as they are."""

from __future__ import annotations

import math
import weakref
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from .batch import check_dense
from .clip import Clip
from .groups import Group
from .host import is_captured, reads_are_free
from .kernels import cpu
from .sharding import Originals, Part, local_tensor, norms_of_squares, norms_of_wholes, whole_value

EPSILON = 1e-6  # torch.nn.utils.clip_grads_with_norm_'s
# A parameter that has a gradient, that gradient, and the parameter's group.
Owned = tuple[Tensor, Tensor, Group]


class GlobalClip:
    """The clip of one optimizer's gradients, for as long as they are these: the same tensors, not written to since.

    torch's count of writes tells; it misses writes through `.data`, and a gradient scaler's division.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Let gradients be stepped as they are."""
        self._clip: Clip | None = None
        self._clipped: dict[Tensor, tuple[weakref.ref[Tensor], int]] = {}
        self._is_used = False

    def clip(
        self,
        groups: list[Group],
        originals: Originals,
        max_norm: float,
        total_norm: Any,
        *,
        error_if_nonfinite: bool,
        at_once: bool,
    ) -> Tensor:
        """See `Mars.clip_grad_norm_`; `at_once` multiplies the gradients themselves."""
        if torch.compiler.is_compiling():
            _refuse_to_compile(
                "clip_grad_norm_() of a MARS optimizer cannot be compiled; use torch.nn.utils.clip_grad_norm_ there"
            )
        max_norm = _checked_max_norm(max_norm)
        owned = _with_gradients(groups)
        check_dense([grad for _, grad, _ in owned])
        clip = self._measure(owned, originals, max_norm, total_norm)
        if error_if_nonfinite and not math.isfinite(clip.total_norm):
            raise RuntimeError(
                f"the total norm of the gradients is {clip.total_norm.item()}, so they cannot be clipped; "
                "error_if_nonfinite=False lets step() skip them"
            )
        if at_once:
            for _, grad, _ in owned:
                local_tensor(grad).mul_(clip.factor.to(grad.device))
            return clip.total_norm
        self._clip, self._is_used = clip, False
        self._clipped = {param: (weakref.ref(grad), _writes(grad)) for param, grad, _ in owned}
        return clip.total_norm

    def _measure(self, owned: list[Owned], originals: Originals, max_norm: float, total_norm: Any) -> Clip:
        norms: dict[Tensor, float] = {}
        if total_norm is None:
            total, norms = _total_norm(owned, originals)
        else:
            total = _as_norm(total_norm, owned)
            if self._clip is not None and not self._changed(owned):  # measured for the norm over several optimizers
                norms = self._clip.norms
        captured = bool(owned) and is_captured(owned[0][0])
        # As torch.nn.utils.clip_grads_with_norm_ computes it.
        factor = torch.clamp(max_norm / (total + EPSILON), max=1.0)
        return Clip(total, factor, norms, is_measured=total_norm is None, captured=captured)

    def of_gradients(self, groups: list[Group]) -> Clip | None:
        """The clip of the gradients that step() is to take; None where they are taken as they are.

        Raises:
            RuntimeError: some of them are not those that were clipped; or a graph is captured of a step alone.
        """
        if self._clip is None:
            return None
        if torch.compiler.is_compiling():
            _refuse_to_compile(
                "clip_grad_norm_() before a compiled step(): the factor would be compiled into it; use "
                "torch.nn.utils.clip_grad_norm_ there"
            )
        owned = _with_gradients(groups)
        changed = self._changed(owned)
        if changed:
            if len(changed) == len(owned) and self._is_used:  # a later update, which is not clipped
                self.forget()
                return None
            raise RuntimeError(
                f"{len(changed)} of {len(owned)} gradients, the first of shape {tuple(changed[0].shape)}, were "
                "replaced or written to after clip_grad_norm_() had measured them: call it after the last backward "
                "pass and a gradient scaler's unscale_, or drop what it has measured with zero_grad()"
            )
        if not self._clip.captured and any(is_captured(param) for param in self._clipped):
            raise RuntimeError(
                "step() in a CUDA graph, clip_grad_norm_() outside of it: every replay would clip by the same factor; "
                "capture both"
            )
        return self._clip

    def use(self) -> None:
        """Note that a step has taken the clip, or was skipped by it."""
        self._is_used = True

    def _changed(self, owned: list[Owned]) -> list[Tensor]:
        """Parameters whose gradient is not the one that was clipped."""
        changed = []
        for param, grad, _ in owned:
            known = self._clipped.get(param)
            if known is None or known[0]() is not grad or known[1] != _writes(grad):
                changed.append(param)
        return changed


def _with_gradients(groups: list[Group]) -> list[Owned]:
    return [(param, param.grad, group) for group in groups for param in group["params"] if param.grad is not None]


@torch._disable_dynamo
def _refuse_to_compile(why: str) -> NoReturn:
    """Raise in compiled code, too: there a bare `raise` makes the compiler leave the function to Python."""
    raise RuntimeError(why)


def _writes(grad: Tensor) -> int:
    """How often torch has written to a gradient in place; it does not count under torch.inference_mode()."""
    local = local_tensor(grad)
    return -1 if local.is_inference() else local._version


def _checked_max_norm(max_norm: Any) -> float:
    """As a float. Raises TypeError or ValueError unless gradients can be clipped to this norm."""
    is_number = isinstance(max_norm, Real) and not isinstance(max_norm, bool)
    if not is_number and not (isinstance(max_norm, Tensor) and max_norm.numel() == 1 and not max_norm.is_complex()):
        raise TypeError(f"max_norm must be a number, got {type(max_norm).__name__}")
    try:
        number = float(max_norm)
    except OverflowError:
        number = math.inf
    if not number >= 0:
        raise ValueError(f"max_norm must be a number of at least 0 (math.inf clips nothing), got {number!r}")
    return number


def _as_norm(total_norm: Any, owned: list[Owned]) -> Tensor:
    norm = whole_value(total_norm)
    if isinstance(norm, Tensor):
        if norm.numel() != 1:
            raise ValueError(f"total_norm must be one number, got a tensor of shape {tuple(norm.shape)}")
        if norm.is_complex():
            raise TypeError(f"total_norm must be a real number, got {norm.dtype}")
        norm = norm.detach().reshape(()).to(torch.promote_types(norm.dtype, torch.float32))
        if not reads_are_free([norm]):
            return norm
    elif not isinstance(norm, Real):
        raise TypeError(f"total_norm must be a number, got {type(norm).__name__}")
    if norm < 0:
        raise ValueError(f"total_norm must be a norm, at least 0, got {float(norm)!r}")
    if isinstance(norm, Tensor):
        return norm
    return torch.tensor(float(norm), dtype=_dtype(owned), device=owned[0][0].device if owned else None)


def _dtype(owned: list[Owned]) -> torch.dtype:
    """Of the total norm: float32, or float64 if a gradient has it."""
    is_wide = any(grad.dtype == torch.float64 for _, grad, _ in owned)
    return torch.float64 if is_wide else torch.float32


def _total_norm(owned: list[Owned], originals: Originals) -> tuple[Tensor, dict[Tensor, float]]:
    """‖g‖₂ over all parameters, and of each where the host knows it and the parameter is one tensor."""
    if not owned:
        return torch.zeros(()), {}
    tensors: list[Tensor] = []
    parts: list[Part] = []
    params: list[Tensor] = []
    for param, grad, group in owned:
        for part in originals.parts_of(param, group):
            tensors.append(part.of(grad))
            parts.append(part)
            params.append(param)
    dtype, device = _dtype(owned), tensors[0].device
    sums = cpu.squares(tensors)
    if sums is not None and not any(part.sums_over for part in parts):
        numbers = [math.sqrt(value) for value in sums]
    else:
        if sums is not None:
            norms = norms_of_squares([torch.tensor(value, dtype=torch.float64) for value in sums], parts)
        else:
            norms = norms_of_wholes(tensors, parts)
        if not reads_are_free(norms):
            wide = torch.float32 if device.type == "mps" else torch.float64
            together = torch.stack([norm.to(device, wide, non_blocking=True) for norm in norms])
            return torch.linalg.vector_norm(together).to(dtype), {}
        numbers = [norm.item() for norm in norms]
    # hypot of infinity and NaN is infinity, hypot of no number raises nothing.
    total = torch.tensor(math.hypot(*numbers), dtype=dtype)
    known = dict(zip(params, numbers, strict=True)) if len(params) == len(owned) else {}
    return total, known
