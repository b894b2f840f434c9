"""The tensors that one step works on: those of a group that are updated alike, as lists of plain local tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .algorithm.correction import relative_update_rms
from .clip import Clip
from .exact import PreviousPoint
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


def collect(
    groups: list[Group],
    state: Mapping[Tensor, State],
    forms: dict[Tensor, Form],
    previous_point: PreviousPoint,
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
        previous_point: has the gradients at x_{t−1} of exact groups.
        originals: knows what lies in flat tensors.
        made: gets the parameters whose state was made or added to.
        clip: of the gradients.
        adjusts_lr: see `Batch`; of every AdamW update among them.
        replicas: see `Batch`.

    Raises:
        RuntimeError: a gradient is sparse; or see `Originals.parts_of`.
    """
    batches = []
    for group in groups:
        alike = _alike([param for param in group["params"] if param.grad is not None])
        form = decide_form(group, state, forms) if alike else Form.PLAIN
        for params in alike:
            batch = _batch(group, params, state, forms, form, previous_point, originals, made, clip)
            batches.append(replace(batch, adjusts_lr=adjusts_lr and group["update"] == "adamw", replicas=replicas))
    return batches


def _alike(params: list[Tensor]) -> list[list[Tensor]]:
    """Lists of parameters of one dtype on one device: mostly one."""
    if len({(param.dtype, param.device) for param in params}) == 1:
        return [params]
    lists: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for param in params:
        lists.setdefault((param.dtype, param.device), []).append(param)
    return list(lists.values())


def _batch(
    group: Group,
    params: list[Tensor],
    state: Mapping[Tensor, State],
    forms: dict[Tensor, Form],
    form: Form,
    previous_point: PreviousPoint,
    originals: Originals,
    made: list[Made],
    clip: Clip | None,
) -> Batch:
    own_grads: list[Any] = [param.grad for param in params]  # hundreds of small tensors take as long as their step
    for grad in own_grads:
        check_dense(grad)
    factor = None if clip is None else clip.factor_on(params[0].device)
    known_norms = clip.norms if clip is not None else {}
    complete = state_keys(params[0].dtype, group, form)
    # Flat tensors have several parts; below, every list has an entry per part.
    parts_of_each = [originals.parts_of(param, group) for param in params]
    states = [state[param] for param in params]
    for param, own in zip(params, states, strict=True):
        if own.keys() != complete or forms.get(param) is not form:
            before = frozenset(own)
            make_state(param, own, group, form, factor)
            if own.keys() - before:
                made.append((param, before))
            forms[param] = form
    is_adamw = group["update"] == "adamw"
    steps = [own["step"] for own in states] if is_adamw else []
    if any(len(own) != 1 for own in parts_of_each):
        # A flat tensor has one t for all: it serves the first part, copies of it the others.
        counts = [len(own) for own in parts_of_each]
        steps = [s for step, n in zip(steps, counts, strict=False) for s in (step, *step.repeat(n - 1).unbind())]
        params = [param for param, n in zip(params, counts, strict=True) for _ in range(n)]
        states = [state[param] for param in params]
    parts = [part for own in parts_of_each for part in own]
    is_whole = all(part is WHOLE for part in parts)
    grads = own_grads
    if not is_whole:  # an engine's buffers; which execution takes a part must not depend on the rank
        grads = [
            part.of(param.grad).contiguous()
            for part, param in zip(parts, params, strict=True)
            if param.grad is not None
        ]

    def kept(key: str) -> list[Tensor]:
        if is_whole:  # hundreds of small tensors take as long as their step
            return [own[key] for own in states]
        return [part.of(own[key]) for part, own in zip(parts, states, strict=True)]

    previous_grads = None
    if form is Form.APPROX:
        previous_grads = kept("last_grad")
    elif form is Form.EXACT and kappa_of(group) > 0:
        previous_grads = previous_point.gradients(params, parts, grads)
    norms = [known_norms[param] for param in params] if is_whole and known_norms else None
    return Batch(
        group,
        form,
        params=params if is_whole else [part.of(param) for part, param in zip(parts, params, strict=True)],
        grads=grads,
        previous_grads=previous_grads,
        exp_avgs=kept("exp_avg"),
        exp_avg_sqs=kept("exp_avg_sq") if is_adamw else [],
        steps=steps,
        compensations=kept("compensation") if needs_compensation(params[0].dtype, group) else [],
        states=states,
        parts=parts,
        is_whole=is_whole,
        factor=factor,
        norms=norms,
    )


def check_dense(grad: Tensor) -> None:
    """Raise a RuntimeError where a gradient is sparse."""
    if grad.is_sparse:
        raise RuntimeError("MARS does not support sparse gradients; build the embedding with sparse=False")
