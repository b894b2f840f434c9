"""Flat tensors that DeepSpeed's ZeRO puts into param_groups, and the slices of parameters that lie in them.

ZeRO replaces the parameters of a group by one flat tensor, this rank's share of all of them; in stage 3 by several,
one step() each. The parameters themselves live on in the model, and tell what lies where:

- stages 1 and 2, and its bfloat16 optimizer: the parameters of a group have become views of one buffer, of which each
  rank of their `_dp_group` has an equal share. (DeepSpeed also notes addresses on them, in `_hp_mapping`; in 0.19.8
  they are wrong with round_robin_gradients.)
- stage 3: every parameter is cut into as many pieces of `partition_numel()` elements as there are ranks, the last ones
  padded, and the pieces lie in the flat tensor one after the other.

None of it is DeepSpeed's promise. So the values are compared, once: between steps the flat tensor has those of the
parameters, which are its rounded copies.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .parts import FLAT, WHOLE, Part, Ranks, Slice, part_of

TESTED = "0.19.8"


class Originals:
    """The parameters that an optimizer was made of, and where they are by now."""

    def __init__(self) -> None:
        self._groups: list[Mapping[str, Any]] = []
        self._params: list[list[weakref.ref[Tensor]]] = []
        self._known: dict[int, weakref.ref[Tensor]] = {}
        self._slices: dict[tuple[int, bool], tuple[weakref.ref[Tensor], list[Part]]] = {}

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

        Of a flat tensor of which nothing but elementwise work is asked, it is the tensor as a whole.

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
        is_elementwise = group["update"] != "shampoo" and group["max_norm"] is None and not group["skip_nonfinite"]
        known = self._slices.get((id(param), is_elementwise))
        if known is not None and known[0]() is param:
            return known[1]
        if self._is_copied(group):
            parts: list[Part] = [WHOLE]
        else:
            parts = [FLAT] if is_elementwise else self._find(param, group)
        self._slices[id(param), is_elementwise] = weakref.ref(param), parts
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
            find = _stage_3 if params and hasattr(params[0], "ds_id") else _stages_1_and_2
            found = list(find(flat, params)) if params else []
            if not found or not all(_is_copied_there(flat, *pair) for pair in found):
                raise ValueError("the values in the flat tensor are not those of the parameters")
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:  # another version works otherwise
            raise _not_found(flat, group) from error
        return [part for part, _ in found]


def _stages_1_and_2(flat: Tensor, params: list[Tensor]) -> Iterator[tuple[Slice, Tensor]]:
    """The slices of `params`, beside their values in the model."""
    group: Ranks = params[0]._dp_group  # type: ignore[attr-defined]  # DeepSpeed's
    buffer, length = params[0].untyped_storage(), flat.numel()
    if buffer.nbytes() != length * group.size() * params[0].element_size():
        raise ValueError(f"the parameters' buffer has {buffer.nbytes()} bytes")
    for param in params:
        if param.untyped_storage().data_ptr() != buffer.data_ptr():
            raise ValueError("the parameters have memory of their own")
        start = int(param.storage_offset())
        end = start + param.numel()
        shares = [(max(start, r * length), min(end, (r + 1) * length)) for r in range(group.size())]
        counts = tuple(max(0, last - first) for first, last in shares)
        first, count = shares[group.rank()][0], counts[group.rank()]
        part = Slice(first - group.rank() * length if count else 0, param.shape, counts, group)
        yield part, param.detach().flatten().narrow(0, first - start if count else 0, count)


def _stage_3(flat: Tensor, params: list[Tensor]) -> Iterator[tuple[Slice, Tensor]]:
    """The slices of parameters, beside their values in the model."""
    zero: Any = params[0]._z3_optimizer  # type: ignore[attr-defined]
    (place,) = (i for i, own in enumerate(zero.fp32_partitioned_groups_flat) if own is flat)
    offset = 0
    for param in zero.fp16_groups[place]:
        group, elements, length = param.ds_process_group, param.ds_numel, param.partition_numel()
        if length != -(-elements // group.size()):
            raise ValueError(f"a parameter of {elements} elements is in pieces of {length}")
        counts = tuple(max(0, min(length, elements - r * length)) for r in range(group.size()))
        part = Slice(offset, torch.Size(param.ds_shape), counts, group)
        yield part, param.ds_tensor.detach().flatten().narrow(0, 0, counts[group.rank()])
        offset += length


def _is_copied_there(flat: Tensor, part: Slice, values: Tensor) -> bool:
    """Whether the flat tensor has at `part`, before rounding, the values that the model computes with."""
    there = part.of(flat.detach()).to(values.device, values.dtype)
    return bool(torch.equal(torch.nan_to_num(there), torch.nan_to_num(values)))


def _not_found(flat: Tensor, group: Mapping[str, Any]) -> RuntimeError:
    deepspeed = sys.modules.get("deepspeed")
    version = f"; this is {deepspeed.__version__}" if deepspeed is not None else ""
    return RuntimeError(
        f"update={group['update']!r} with max_norm={group['max_norm']} needs whole matrices, but got a flat slice of "
        f"shape {tuple(flat.shape)} and cannot find the parameters in it: make the optimizer of the model's own "
        f"parameters, before deepspeed.initialize, with DeepSpeed {TESTED}'s ZeRO 1, 2 or 3{version}; or use FSDP2"
    )
