"""g_{t−1}: kept by taking over the gradient's memory where nobody can write to it any more, by value elsewhere."""

from __future__ import annotations

import operator
import weakref
from typing import Any

import torch
from torch import Tensor

# torch._lazy_clone is a prototype: the clone and the original share memory until either is written to. Where a version
# lacks it, or what the proof below asks for, gradients are copied.


def keep(last_grads: list[Tensor], grads: list[Tensor], finite: list[bool] | None) -> list[Tensor]:
    """g_t in the place of the g_{t−1} that this step used up. Non-finite entries become zero.

    zero_grad(set_to_none=False), DDP's bucket views and gradient-reusing engines write into the very tensors in
    `grads`, so the values are copied, unless `can_take_over` proves that a later write would be noticed. One bad
    gradient must not stay in the correction, hence the zeros.

    Args:
        last_grads: memory that may be written to; its dtype is the result's.
        grads: g_t. Not modified.
        finite: for each whether g_t is; None if that is not known.

    Returns:
        What to keep as g_{t−1}: members of `last_grads`, or lazy clones of members of `grads`.
    """
    result: list[Tensor] = []
    for i, (last_grad, grad) in enumerate(zip(last_grads, grads, strict=True)):
        alike = last_grad.dtype == grad.dtype and last_grad.stride() == grad.stride()
        if finite is not None and finite[i] and alike and can_take_over(grad):
            last_grad = torch._lazy_clone(grad)
        elif last_grad.dtype == grad.dtype:
            torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0, out=last_grad)
        else:
            last_grad.copy_(torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0))
        result.append(last_grad)
    return result


def keep_unless(flag: Tensor, last_grads: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """As `keep`, by value; but where `flag` is raised, a number on the device, `last_grads` stay as they are."""
    for last_grad, grad in zip(last_grads, grads, strict=True):
        finite = torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)
        last_grad.copy_(torch.where(flag > 0, last_grad, finite.to(last_grad.dtype)))
    return last_grads


def can_take_over(grad: Tensor) -> bool:
    """Whether memory of `grad` may be kept as g_{t−1} without copying it.

    torch makes the copy by itself if anything writes to `grad` through torch later ("copy on write"); if the
    gradient is dropped instead, as zero_grad(set_to_none=True) does, there never is one. What could write behind
    torch's back is excluded: other tensors in the same memory (buckets, flat buffers, `.data`), memory that is
    NumPy's, shared between processes or exported through DLPack, and accelerators, whose captured graphs write to
    addresses.
    """
    if _OWNERS_OF_A_FRESH_GRADIENT is None or type(grad) is not Tensor or not grad.is_cpu or grad._is_view():
        return False
    storage = grad.untyped_storage()
    return (
        _owners(grad, storage) == _OWNERS_OF_A_FRESH_GRADIENT
        and storage.resizable()  # .numpy() makes it fixed
        and not storage.is_shared()
        and storage.nbytes() == grad.numel() * grad.element_size()
    )


def _owners(tensor: Tensor, storage: torch.UntypedStorage) -> tuple[int, int]:
    """How many hold the tensor (Python's variables count as one), and how many hold its memory."""
    uses: int = tensor._use_count()  # type: ignore[attr-defined]  # not in torch's stubs
    return uses, torch._C._storage_Use_Count(storage._cdata)


def _owners_of_a_fresh_gradient() -> tuple[int, int] | None:
    needed = (
        *((torch, "_lazy_clone"), (Tensor, "_use_count"), (torch.UntypedStorage, "resizable")),
        *((torch._C, "_storage_Use_Count"), (torch._C, "_data_address")),
    )
    if not all(hasattr(owner, name) for owner, name in needed):
        return None
    param = torch.nn.Parameter(torch.zeros(1))
    param.grad = torch.zeros(1)
    return _owners(param.grad, param.grad.untyped_storage())


_OWNERS_OF_A_FRESH_GRADIENT = _owners_of_a_fresh_gradient()


class LastNorms:
    """‖g_{t−1}‖₂, measured when it was g_t, for as long as nothing has written to "last_grad" since.

    With it a step can often tell from ‖g_t‖ alone that c_t is too short to be clipped, without a pass over g_{t−1}.
    A norm is a number or a place in a tensor, as the caller likes. torch's count of writes tells whether a tensor was
    written to; it misses writes through `.data`, and collective operations.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], tuple[int, int], Any]] = {}
        self._vectors: dict[int, tuple[list[weakref.ref[Tensor]], tuple[list[int], list[int]], Tensor, int]] = {}
        self._is_asked = False
        self._trusted = hasattr(torch._C, "_data_address")  # without it, norms are measured anew

    def take(self, last_grads: list[Tensor]) -> list[Any]:
        """The norms, which are then forgotten; None where it is not known."""
        norms: list[Any] = [None] * len(last_grads)
        for i, last_grad in enumerate(last_grads):
            known = self._known.pop(id(last_grad), None)
            if known is not None and known[0]() is last_grad and known[1] == _contents(last_grad):
                norms[i] = known[2]
        return norms

    def remember(self, last_grads: list[Tensor], norms: list[Any]) -> None:
        """The norms that `take` is to return; None where unknown."""
        if self._trusted:
            for last_grad, norm in zip(last_grads, norms, strict=True):
                self._known[id(last_grad)] = weakref.ref(last_grad), _contents(last_grad), norm

    def take_vector(self, last_grads: list[Tensor], stream: int) -> Tensor | None:
        """The norms of all of `last_grads` in one tensor, as `remember_vector` got them; they are then forgotten.

        None where they are not known, are those of other tensors or in another order, or were written on another
        stream of the device, whose memory may be reused by now.
        """
        self._is_asked = True
        known = self._vectors.pop(id(last_grads[0]), None) if last_grads else None
        if known is None or known[3] != stream or len(known[0]) != len(last_grads):
            return None
        references, contents, norms, _ = known
        are_the_same = all(map(operator.is_, map(_call, references), last_grads))
        return norms if are_the_same and contents == _contents_of_all(last_grads) else None

    def remember_vector(self, last_grads: list[Tensor], norms: Tensor, stream: int) -> None:
        """The norms that `take_vector` is to return: one tensor on the device, which the host need not look at."""
        if self._trusted:
            references = list(map(weakref.ref, last_grads))
            self._vectors[id(last_grads[0])] = references, _contents_of_all(last_grads), norms, stream

    @property
    def is_asked(self) -> bool:
        """Whether norms of vectors were ever wanted: else nobody need count the writes to "last_grad"."""
        return self._is_asked

    def distrust(self) -> None:
        """Never remember anything again: a captured graph will write to g_{t−1} whenever it is replayed."""
        self._trusted = False
        self._known.clear()
        self._vectors.clear()


_call = operator.methodcaller("__call__")  # of weak references


def _contents_of_all(tensors: list[Tensor]) -> tuple[list[int], list[int]]:
    """`_contents` of hundreds of tensors."""
    addresses: list[int] = list(map(torch._C._data_address, tensors))  # type: ignore[attr-defined]
    return list(map(operator.attrgetter("_version"), tensors)), addresses


def _contents(tensor: Tensor) -> tuple[int, int]:
    """Differs when the values do; does not make a lazy clone copy, as data_ptr() would."""
    return tensor._version, torch._C._data_address(tensor)  # type: ignore[attr-defined]  # not in torch's stubs
