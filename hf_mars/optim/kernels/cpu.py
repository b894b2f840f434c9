"""MARS-AdamW's and MARS-Lion's step on CPUs in one compiled pass over memory (`_cpu.c`).

Correction, clip, moving averages and update at once: on a CPU the passes over memory are the cost of a step. Where the
package was installed without a C compiler, or torch's threads are not OpenMP's, the module is missing and steps are
composed of torch's kernels, with the same results to rounding.
"""

from __future__ import annotations

import math
from array import array
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..batch import Batch
from ..form import Form
from ..last_grad import LastNorms
from ..sharding import all_ranks_can, norms_of_squares
from ..skipping import Skip

_cpu: ModuleType | None
try:
    _cpu = import_module("._cpu", __package__)
except ImportError:
    _cpu = None

_PLAIN = {(cls, torch.float32, True, True) for cls in (Tensor, Parameter)}  # on the CPU and contiguous


def is_compiled() -> bool:
    """Whether the compiled step is there at all."""
    return _cpu is not None


def is_for(device: torch.device) -> bool:
    """Whether this execution is for tensors on `device`."""
    return device.type == "cpu"


def why_not(batch: Batch) -> str | None:
    """Why `step` cannot take a batch; None if it can.

    It takes plain contiguous float32 tensors, where the choice of kernels is ours. Groups that get AdamW as it is are
    torch's.
    """
    group = batch.group
    if group["update"] not in ("adamw", "lion"):
        return "the compiled step is for MARS-AdamW and MARS-Lion"
    if group["foreach"] is not None or not group["fused"]:
        return f"foreach={group['foreach']}, fused={group['fused']}"
    if group["update"] == "adamw" and batch.previous_grads is None and group["max_norm"] is None:
        return "plain AdamW has a fused one there"
    able = _cpu is not None
    if _needs_an_exchange(batch):  # where all ranks have to do the same
        groups = dict.fromkeys(group for part in batch.parts for group in part.sums_over)
        able = all_ranks_can("compiled step", able, groups, batch.params[0].device)
    if not able:
        return "the compiled step is missing (no C compiler at installation, or torch's threads are not OpenMP's)"
    averages = [batch.exp_avgs, batch.exp_avg_sqs] if group["update"] == "adamw" else [batch.exp_avgs]
    lists = [batch.params, batch.grads, batch.previous_grads or batch.grads, *averages]
    # In one expression each: hundreds of tensors may be small, and loops over them take as long as their step.
    if not {(type(t), t.dtype, t.is_cpu, t.is_contiguous()) for ts in [*lists, batch.steps] for t in ts} <= _PLAIN:
        return "not all tensors are plain contiguous float32 tensors"
    shapes = [param.shape for param in batch.params]
    if not all([t.shape for t in ts] == shapes for ts in lists[2:]):
        return "a state has another shape than its parameter"  # of another model: torch's kernels raise
    return None


class _Measured(NamedTuple):
    """‖g_t‖₂ of the tensors of a batch, NaN where it is not known; and the factors of their c_t, if it clips."""

    norms: array[float]
    clip_factors: array[float] | None


def measure(batches: list[Batch], last_norms: LastNorms, skip: Skip) -> list[_Measured]:
    """The clip's norms, which also say whether a gradient is not finite; see `execution.Execution`."""
    exchanging = [batch for batch in batches if _needs_an_exchange(batch)]
    of_parts = _measure_parts(exchanging, skip) if exchanging else {}
    return [of_parts.get(id(batch)) or _measure(batch, last_norms, skip) for batch in batches]


def _needs_an_exchange(batch: Batch) -> bool:
    return not batch.is_whole and batch.group["max_norm"] is not None


def _measure_parts(batches: list[Batch], skip: Skip) -> dict[int, _Measured]:
    """Of parameters that are spread over ranks, by the id of their batch, with one exchange between ranks."""
    assert _cpu is not None
    squares = []
    for batch in batches:
        sums = array("d", bytes(8 * len(batch.params)))
        previous_grads = None if batch.previous_grads is None else _addresses(batch.previous_grads)
        sizes, grads = _sizes(batch.grads), _addresses(batch.grads)
        factor = _factor(batch)
        _cpu.add_squares(sizes, grads, previous_grads, sums, batch.kappa, factor, torch.get_num_threads())
        squares += [torch.tensor(value, dtype=torch.float64) for value in sums]
    norms = iter(norms_of_squares(squares, [part for batch in batches for part in batch.parts]))
    result = {}
    for batch in batches:
        lengths, max_norm = [next(norms).item() for _ in batch.params], batch.group["max_norm"]
        factors = array("d", [1.0 if x <= max_norm else max_norm / x if x < math.inf else math.nan for x in lengths])
        skip.add(factors)
        result[id(batch)] = _Measured(array("d"), factors)
    return result


def _measure(batch: Batch, last_norms: LastNorms, skip: Skip) -> _Measured:
    assert _cpu is not None
    max_norm, previous_grads = batch.group["max_norm"], batch.previous_grads
    nothing = array("d", [math.nan]) * len(batch.params)
    factor = _factor(batch)
    known = None if batch.norms is None else array("d", [factor * norm for norm in batch.norms])
    if max_norm is None:
        return _Measured(known or nothing, None)
    previous = last_norms.take(previous_grads) if batch.form is Form.APPROX and previous_grads else []
    norms = array("d", [math.nan if norm is None else norm for norm in previous]) or nothing
    clip_factors = array("d", nothing)
    _cpu.norms(
        _sizes(batch.params),
        _addresses(batch.grads),
        None if previous_grads is None else _addresses(previous_grads),
        norms,
        known,
        clip_factors,
        batch.kappa,
        max_norm,
        factor,
        torch.get_num_threads(),
    )
    skip.add(clip_factors)
    return _Measured(norms, clip_factors)


def step(batches: list[Batch], measured: list[_Measured], last_norms: LastNorms, skip: Skip) -> None:
    """c_t, c̃_t, m_t (and v_t), the update, and g_t in the place of g_{t−1}; see `execution.Execution`."""
    for batch, some in zip(batches, measured, strict=True):
        _step(batch, some, last_norms)


def _step(batch: Batch, measured: _Measured, last_norms: LastNorms) -> None:
    assert _cpu is not None
    params, group, previous_grads = batch.params, batch.group, batch.previous_grads
    beta1, beta2 = group["betas"]
    is_adamw = group["update"] == "adamw"
    factor = _factor(batch)
    is_clipped = factor != 1  # then memory of g_t does not hold what is kept
    # g_{t−1} of a part stays the memory that it is.
    by_value = batch.form is Form.APPROX and (is_clipped or not batch.is_whole)
    finite = _cpu.step(
        _sizes(params),
        _addresses(params),
        _addresses(batch.exp_avgs),
        _addresses(batch.exp_avg_sqs) if is_adamw else None,
        _addresses(batch.grads),
        None if previous_grads is None else _addresses(previous_grads),
        measured.clip_factors,
        _addresses(batch.steps) if is_adamw else None,
        batch.kappa,
        beta1,
        beta2,
        group["eps"],
        batch.momentum_gamma,
        batch.lr,
        batch.weight_decay,
        factor,
        by_value,
        torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version(params)  # they were changed behind autograd's back
    if batch.form is Form.APPROX and batch.is_whole:
        assert previous_grads is not None
        if by_value:
            torch.autograd.graph.increment_version(previous_grads)
        kept = previous_grads if by_value else batch.keep_last_grads(finite)
        if group["max_norm"] is not None:
            last_norms.remember(kept, measured.norms.tolist())


def squares(tensors: list[Tensor]) -> list[float] | None:
    """Σ t² of each tensor, in blocks of float32 that are added up in float64; None if it cannot be done here."""
    if _cpu is None or not {(type(t), t.dtype, t.is_cpu, t.is_contiguous()) for t in tensors} <= _PLAIN:
        return None
    sums = array("d", bytes(8 * len(tensors)))
    _cpu.add_squares(_sizes(tensors), _addresses(tensors), None, sums, 0.0, 1.0, torch.get_num_threads())
    return sums.tolist()


def _factor(batch: Batch) -> float:
    """f of the global clip, of which a CPU knows the value."""
    return 1.0 if batch.factor is None else float(batch.factor)


def _sizes(tensors: list[Tensor]) -> array[int]:
    return array("q", [t.numel() for t in tensors])


def _addresses(tensors: list[Tensor]) -> array[int]:
    return array("q", [t.data_ptr() for t in tensors])
