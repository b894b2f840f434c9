"""The tensors that one step works on: those of a group that are updated alike, as lists of plain local tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from .algorithm.correction import relative_update_rms
from .clip import Clip
from .form import Form, kappa_of
from .groups import Group
from .last_grad import keep, keep_unless
from .precision import needs_compensation
from .sharding import WHOLE, Originals, Part, Ranks
from .state import Made, State, decide_form, make_state, state_keys


@dataclass
class Batch:
    """Parameters of one group that have a gradient, of one dtype on one device.

    Every list has one entry per parameter: this process's part of it, a plain tensor that shares its memory. Lists
    that the update has no use for are empty.
    """

    group: Group
    form: Form
    params: list[Tensor]
    grads: list[Tensor]
    previous_grads: list[Tensor] | None  # g_{t−1} or ∇f(x_{t−1}, ξ_t); None where c_t is g_t
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    compensations: list[Tensor]
    states: list[State]
    parts: list[Part]  # how the tensors lie in the whole parameters; for the two services of sharding.py alone
    is_whole: bool = True  # this process holds all of every parameter
    adjusts_lr: bool = False  # whether `adjust_lr_fn` is about this update, MARS-AdamW's
    replicas: Ranks | None = None  # ranks that hold equal parameters and gradients, where that is known
    first: Tensor | None = None  # of the group's parameters in it: what is known of it between steps is kept with that
    factor: float | Tensor | None = None  # f of the global clip: g_t is f · grads; None: 1
    norms: list[float] | None = None  # ‖·‖₂ of grads, where that clip has measured them
    plan: Any = None  # what kernels know of its tensors

    @property
    def kappa(self) -> float:
        return kappa_of(self.group)

    @property
    def lr(self) -> Any:
        """η of the update's adaptive part: η/r with `adjust_lr_fn="match_rms_adamw"`, see `relative_update_rms`."""
        return self.group["lr"] / self._relative_update_rms

    @property
    def weight_decay(self) -> float:
        """λ, so that `lr` times it is the group's ηλ."""
        return float(self.group["weight_decay"] * self._relative_update_rms)

    @property
    def _relative_update_rms(self) -> float:
        group = self.group
        if not self.adjusts_lr or self.form is not Form.APPROX or group["adjust_lr_fn"] != "match_rms_adamw":
            return 1.0  # in exact mode both gradients have the same noise, so that c_t has that of g_t
        return relative_update_rms(group["gamma"], group["betas"][0])

    @property
    def momentum_gamma(self) -> float:
        """γ of correction.momentum: in the one-tensor form the momentum of plain gradients does the correction."""
        return float(self.group["gamma"]) if self.form is Form.ONE_TENSOR else 0.0

    def clipped(self) -> Batch:
        """The same with g_t itself in `grads`: temporary copies, where the global clip has a factor."""
        if self.factor is None:
            return self
        return replace(self, grads=[grad * self.factor for grad in self.grads], factor=None, norms=None)

    def keep_last_grads(self, finite: list[bool] | None, flag: Tensor | None = None) -> list[Tensor]:
        """g_t in the place of g_{t−1}, unless `flag` is raised; see `last_grad.keep`. Returns g_t as it is kept."""
        assert self.previous_grads is not None
        if flag is not None:
            return keep_unless(flag, self.previous_grads, self.grads)
        if not self.is_whole:  # their g_{t−1} stays the memory that it is
            return keep(self.previous_grads, self.grads, None)
        kept = keep(self.previous_grads, self.grads, finite)
        for state, last_grad in zip(self.states, kept, strict=True):
            state["last_grad"] = last_grad
        return kept

    def pieces(self, elements: int) -> Iterator[Batch]:
        """The same in batches of at most so many elements, or of one parameter; the same batches on every rank."""
        start, count = 0, 0
        sizes = [part.elements_per_rank(param) for part, param in zip(self.parts, self.params, strict=True)]
        for i, size in enumerate(sizes):
            if i > start and count + size > elements:
                yield self._piece(slice(start, i))
                start, count = i, 0
            count += size
        yield self._piece(slice(start, None))

    def subset(self, places: list[int]) -> Batch:
        """The same of the parameters at some places alone."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        lists = {name: value for name, value in values.items() if isinstance(value, list) and value}
        values.update({name: [value[i] for i in places] for name, value in lists.items()})
        return replace(self, **{**values, "plan": None})

    def _piece(self, chosen: slice) -> Batch:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values.update({name: value[chosen] for name, value in values.items() if isinstance(value, list)})
        return replace(self, **{**values, "plan": None})


Gradients = Callable[[list[Tensor], list[Part], list[Tensor]], list[Tensor]]


class Seen:
    """What has been found out about parameters of a group, and holds as long as nothing has changed.

    Hundreds of small tensors may be looked at in as long as their step takes.
    """

    def __init__(self, group: Group, params: list[Tensor], form: Form, parts_of_each: list[list[Part]]):
        self.form, self.dtype = form, params[0].dtype
        self.counts = [len(parts) for parts in parts_of_each]  # flat tensors have several parts
        self.has_several = any(count != 1 for count in self.counts)
        self.parts = [part for parts in parts_of_each for part in parts]
        self.is_whole = all(part is WHOLE for part in self.parts)
        self._settings = [group[key] for key in _DECISIVE]
        self._lengths = {len(state_keys(self.dtype, group, form))}

    def watch(self, params: list[Tensor]) -> None:
        """Take note of which parameters these are, for `holds`."""
        self._ids = list(map(id, params))
        # Until one of them is no more. The function must not know what it is kept in: that would be a circle.
        alive = self._alive = [True]
        self._references = [weakref.ref(param, lambda _: alive.clear()) for param in params]

    def holds(self, group: Group, params: list[Tensor], states: list[State]) -> bool:
        """Whether these are the parameters, and neither their dtype nor their states nor settings are others."""
        return (
            bool(self._alive)
            and list(map(id, params)) == self._ids
            and {param.dtype for param in params} == {self.dtype}
            and [group[key] for key in _DECISIVE] == self._settings
            and set(map(len, states)) == self._lengths
        )


# Settings from which the forms, states and parts of a group's parameters follow.
_DECISIVE = ("update", "exact", "gamma", "betas", "max_norm", "skip_nonfinite", "kahan_sum")


def collect(
    groups: list[Group],
    state: Mapping[Tensor, State],
    forms: dict[Tensor, Form],
    seen: dict[int, Seen],
    gradients_at_previous_point: Gradients,
    originals: Originals,
    made: list[Made],
    clip: Clip | None = None,
    *,
    adjusts_lr: bool,
    replicas: Ranks | None,
) -> list[Batch]:
    """Batches of all parameters that have a gradient. Makes the states of those that have none yet.

    Args:
        groups: the optimizer's param_groups.
        state: the optimizer's.
        forms: of each parameter that has a state; brought up to date.
        seen: by the place of a group, what is known of its parameters; brought up to date.
        gradients_at_previous_point: of exact groups, see `PreviousPoint.gradients`.
        originals: knows what lies in flat tensors.
        made: gets the parameters whose state was made or added to.
        clip: of the gradients.
        adjusts_lr: see `Batch`; of every AdamW update among them.
        replicas: see `Batch`.

    Raises:
        RuntimeError: a gradient is sparse; or see `Originals.parts_of`.
    """
    batches = []
    for place, group in enumerate(groups):
        params = group["params"]
        grads = [param.grad for param in params]
        if NoneType in set(map(type, grads)):
            params = [param for param, grad in zip(params, grads, strict=True) if grad is not None]
            grads = [grad for grad in grads if grad is not None]
        if not params:
            continue
        check_dense(grads)
        known = seen.get(place)
        if known is not None and known.holds(group, params, states := list(map(state.__getitem__, params))):
            batches.append(_batch(group, params, grads, states, known, gradients_at_previous_point))
            continue
        form = decide_form(group, state, forms)
        for alike in _alike(params):
            parts_of_each = [originals.parts_of(param, group) for param in alike]
            states = [state[param] for param in alike]
            factor = None if clip is None else clip.factor_on(alike[0].device)
            _bring_into_form(alike, states, group, form, forms, made, factor)
            known = Seen(group, alike, form, parts_of_each)
            if not torch.compiler.is_compiling():
                known.watch(alike)
                seen[place] = known
            grads = [param.grad for param in alike]
            batches.append(_batch(group, alike, grads, states, known, gradients_at_previous_point))
    for batch in batches:
        batch.adjusts_lr, batch.replicas = adjusts_lr and batch.group["update"] == "adamw", replicas
        if clip is not None:
            batch.factor = clip.factor_on(batch.params[0].device)
            if batch.is_whole and clip.norms:
                batch.norms = [clip.norms[param] for param in batch.params]
    return batches


def _alike(params: list[Tensor]) -> list[list[Tensor]]:
    """Lists of parameters of one dtype on one device: mostly one."""
    if len({(param.dtype, param.device) for param in params}) == 1:
        return [params]
    lists: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for param in params:
        lists.setdefault((param.dtype, param.device), []).append(param)
    return list(lists.values())


def _bring_into_form(
    params: list[Tensor],
    states: list[State],
    group: Group,
    form: Form,
    forms: dict[Tensor, Form],
    made: list[Made],
    factor: float | Tensor | None,
) -> None:
    complete = state_keys(params[0].dtype, group, form)
    for param, own in zip(params, states, strict=True):
        if own.keys() != complete or forms.get(param) is not form:
            before = frozenset(own)
            make_state(param, own, group, form, factor)
            if own.keys() - before:
                made.append((param, before))
            forms[param] = form


def _batch(
    group: Group,
    params: list[Tensor],
    grads: list[Any],
    states: list[State],
    seen: Seen,
    gradients_at_previous_point: Gradients,
) -> Batch:
    form, first = seen.form, params[0]
    is_adamw = group["update"] == "adamw"
    steps = [own["step"] for own in states] if is_adamw else []
    if seen.has_several:
        # A flat tensor has one t for all: it serves the first part, copies of it the others.
        counts = seen.counts
        steps = [s for step, n in zip(steps, counts, strict=False) for s in (step, *step.repeat(n - 1).unbind())]
        params = [param for param, n in zip(params, counts, strict=True) for _ in range(n)]
        grads = [grad for grad, n in zip(grads, counts, strict=True) for _ in range(n)]
        states = [own for own, n in zip(states, counts, strict=True) for _ in range(n)]
    parts, is_whole = seen.parts, seen.is_whole
    if not is_whole:  # an engine's buffers; which execution takes a part must not depend on the rank
        grads = [part.of(grad).contiguous() for part, grad in zip(parts, grads, strict=True)]

    def kept(key: str) -> list[Tensor]:
        if is_whole:
            return [own[key] for own in states]
        return [part.of(own[key]) for part, own in zip(parts, states, strict=True)]

    previous_grads = None
    if form is Form.APPROX:
        previous_grads = kept("last_grad")
    elif form is Form.EXACT and kappa_of(group) > 0:
        previous_grads = gradients_at_previous_point(params, parts, grads)
    return Batch(
        group,
        form,
        params=params if is_whole else [part.of(param) for part, param in zip(parts, params, strict=True)],
        grads=grads,
        previous_grads=previous_grads,
        exp_avgs=kept("exp_avg"),
        exp_avg_sqs=kept("exp_avg_sq") if is_adamw else [],
        steps=steps,
        compensations=kept("compensation") if needs_compensation(seen.dtype, group) else [],
        states=states,
        parts=parts,
        is_whole=is_whole,
        first=first,
    )


def check_dense(grads: list[Tensor]) -> None:
    """Raise a RuntimeError where a gradient is sparse."""
    if True in [grad.is_sparse for grad in grads]:
        raise RuntimeError("MARS does not support sparse gradients; build the embedding with sparse=False")
