"""What ranks must do alike, although each could decide it for itself."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
import torch.distributed as dist

from .devices import exchange_device
from .parts import Ranks

_agreed: weakref.WeakKeyDictionary[Ranks, dict[str, bool]] = weakref.WeakKeyDictionary()


def all_ranks_can(what: str, able: bool, groups: Iterable[Ranks], device: torch.device) -> bool:
    """Whether every rank of these groups is able to do what this one is.

    Args:
        what: a name for it.
        able: whether this process is: a property of its machine, not of the moment, since each group is asked once.
        groups: the groups of ranks, in the same order on all of them.
        device: of the tensors that it is about.
    """
    for group in groups:
        answers = _agreed.setdefault(group, {})
        if what not in answers:
            answer = torch.tensor(float(able), device=exchange_device(group, device))
            dist.all_reduce(answer, dist.ReduceOp.MIN, group=group)
            answers[what] = bool(answer.item())
        able = able and answers[what]
    return able


def is_one_of_several() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
