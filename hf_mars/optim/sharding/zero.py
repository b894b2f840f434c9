"""Flat tensors that DeepSpeed's ZeRO puts into param_groups, and the slices of parameters that lie in them.

ZeRO replaces the parameters of a group by one flat tensor, this rank's share of all of them; in stage 3 by several,
one step() each. The parameters themselves live on in the model, and DeepSpeed notes on them what lies where:

- stages 1 and 2, and its bfloat16 optimizer: `_hp_mapping`, with the addresses of this rank's fragment within the
  parameter and within the flat tensor, None where this rank has nothing of it; and `_dp_group`;
- stage 3: every parameter is cut into as many pieces of `partition_numel()` elements as there are ranks, the last ones
  padded, and the pieces lie in the flat tensor one after the other.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .parts import WHOLE, Part, Slice, part_of

TESTED = "0.19.8"


class Originals:
    """The parameters that an optimizer was made of, and where they are by now."""

    def __init__(self) -> None:
        self._groups: list[Mapping[str, Any]] = []
        self._params: list[list[weakref.ref[Tensor]]] = []
        self._known: dict[int, weakref.ref[Tensor]] = {}
        self._slices: dict[int, tuple[weakref.ref[Tensor], list[Part]]] = {}

    def add(self, group: Mapping[str, Any]) -> None:
        """Take note of the parameters of a new param_group."""
        refs = [weakref.ref(param) for param in group["params"]]
        self._groups.append(group)
        self._params.append(refs)
        self._known.update({id(ref()): ref for ref in refs})

    def follow(self, before: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        """Recognise the param_groups that have taken the places of those before, as loading a state_dict does."""
        for old, new in zip(before, groups, strict=True):
            self._groups = [new if group is old else group for group in self._groups]

    def parts_of(self, param: Tensor, group: Mapping[str, Any]) -> list[Part]:
        """The parts that lie in an entry of a param_group: mostly one, in a flat tensor several.

        Of a flat tensor of which nothing but elementwise work is asked, it is the tensor as a whole. On the first call
        for a flat tensor the ranks that share its parameters exchange a message, so that all of them have to make it.

        Raises:
            RuntimeError: the work needs whole parameters, and where they are in a flat tensor is not known; or exact
                mode is asked for of parameters that are not the model's own.
        """
        if self._is_known(param) or isinstance(param, DTensor):
            return [part_of(param)]
        if group["exact"]:
            raise RuntimeError(
                "exact=True does not work with DeepSpeed, which moves the parameters of the model only after step(); "
                "use FSDP2, DDP or exact=False"
            )
        if param.ndim != 1:
            return [WHOLE]
        known = self._slices.get(id(param))
        if known is not None and known[0]() is param:
            return known[1]
        is_elementwise = group["update"] != "shampoo" and group["max_norm"] is None
        if is_elementwise or self._is_copied(group):
            return [WHOLE]
        parts = self._find(param, group)
        self._slices[id(param)] = weakref.ref(param), parts
        return parts

    def _is_known(self, param: Tensor) -> bool:
        known = self._known.get(id(param))
        return known is not None and known() is param

    def _is_copied(self, group: Mapping[str, Any]) -> bool:
        """Whether the group holds copies of the parameters it was made of, one for one (DeepSpeed without ZeRO)."""
        params = self._of(group)
        return [p.shape for p in group["params"]] == [getattr(p, "ds_shape", p.shape) for p in params]

    def _of(self, group: Mapping[str, Any]) -> list[Tensor]:
        """The parameters of which a group was made, those that an optimizer of DeepSpeed's has taken over."""
        for own, refs in zip(self._groups, self._params, strict=True):
            if own is group:
                params = [param for ref in refs if (param := ref()) is not None]
                return [p for p in params if p.requires_grad and getattr(p, "ds_numel", p.numel()) > 0]
        return []

    def _find(self, flat: Tensor, group: Mapping[str, Any]) -> list[Part]:
        params = self._of(group)
        try:
            found = _stage_3(flat, params) if hasattr(_first(params), "ds_id") else _stages_1_and_2(flat, params)
        except (AttributeError, TypeError) as error:  # another version keeps its notes elsewhere
            raise _not_found(flat, group) from error
        if not found or not _are_within(found, flat):
            raise _not_found(flat, group)
        return list(found)


def _first(params: list[Tensor]) -> Tensor | None:
    return params[0] if params else None


def _stages_1_and_2(flat: Tensor, params: list[Tensor]) -> list[Slice]:
    fragments: list[tuple[int, int, int]] = []  # offset in the flat tensor; start and length within the parameter
    for param in params:
        mapping: Any = param._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
        if mapping is None:
            fragments.append((0, 0, 0))
            continue
        in_flat, in_param = mapping.hp_fragment_address, mapping.lp_fragment_address
        if mapping.hp_fragment.data_ptr() != flat.data_ptr() + in_flat.start * flat.itemsize:
            return []  # of another flat tensor
        fragments.append((in_flat.start, in_param.start, in_param.numel))
    if not params:
        return []
    group = params[0]._dp_group  # type: ignore[attr-defined]
    everyones: list[Any] = [None] * group.size()
    dist.all_gather_object(everyones, fragments, group=group)
    slices = []
    for i, (param, (offset, _, _)) in enumerate(zip(params, fragments, strict=True)):
        counts = [fragments_of_rank[i][2] for fragments_of_rank in everyones]
        starts = itertools.accumulate(counts, initial=0)
        follow_each_other = all(
            length == 0 or start == expected
            for (_, start, length), expected in zip((f[i] for f in everyones), starts, strict=False)
        )
        if not follow_each_other or sum(counts) != param.numel():
            return []
        slices.append(Slice(offset, param.shape, tuple(counts), group))
    return slices


def _stage_3(flat: Tensor, params: list[Tensor]) -> list[Slice]:
    zero: Any = params[0]._z3_optimizer  # type: ignore[attr-defined]
    (place,) = (i for i, own in enumerate(zero.fp32_partitioned_groups_flat) if own is flat)
    slices, offset = [], 0
    for param in zero.fp16_groups[place]:
        group, elements, length = param.ds_process_group, param.ds_numel, param.partition_numel()
        ranks = group.size()
        if length != -(-elements // ranks):
            return []
        counts = tuple(max(0, min(length, elements - r * length)) for r in range(ranks))
        slices.append(Slice(offset, torch.Size(param.ds_shape), counts, group))
        offset += length
    return slices


def _are_within(slices: list[Slice], flat: Tensor) -> bool:
    return all(s.offset + s.counts[s.spread_over.rank()] <= flat.numel() for s in slices)


def _not_found(flat: Tensor, group: Mapping[str, Any]) -> RuntimeError:
    deepspeed = sys.modules.get("deepspeed")
    version = f"; this is {deepspeed.__version__}" if deepspeed is not None else ""
    return RuntimeError(
        f"update={group['update']!r} with max_norm={group['max_norm']} needs whole matrices, but got a flat slice of "
        f"shape {tuple(flat.shape)} and cannot find the parameters in it: make the optimizer of the model's own "
        f"parameters, before deepspeed.initialize, with DeepSpeed {TESTED}'s ZeRO 1, 2 or 3{version}; or use FSDP2"
    )
