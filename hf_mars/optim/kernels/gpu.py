"""The step on GPUs in two passes over memory (`triton_norms.py`, `triton_update.py`; `matrices.py` for MARS-Shampoo).

Correction, clip, moving averages, update and the copy of g_t at once, for all parameters with equal settings. As on
CPUs, the first pass reads g_t alone where ‖g_t‖ and the known ‖g_{t−1}‖ bound ‖c_t‖ well below max_norm; the device
decides that, and the host waits for nothing. Everything is computed in float32 (float64 for float64 parameters),
whatever the dtypes of parameters, gradients and states. Where Triton is missing, steps are composed of torch's
kernels, with the same results to rounding.

With TRITON_INTERPRET=1 in the environment the kernels run in Triton's interpreter, on CPU tensors: for tests.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import Parameter

from ..batch import Batch
from ..host import is_captured
from ..last_grad import LastNorms
from ..precision import needs_wide_copies
from ..sharding import Ranks, add_up, all_ranks_can, is_one_of_several
from ..skipping import Skip
from . import copies
from .launch import Kernels, Launch, operands_of
from .launch import divide as divide_by_launch
from .matrices import MatrixLaunch
from .plan import BLOCK, DTYPES, Plan, plan_of, tables_of

logger = logging.getLogger(__name__)


def is_interpreted() -> bool:
    """Whether the kernels run on CPU tensors, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_for(device: torch.device) -> bool:
    """Whether this execution is for tensors on `device`."""
    return device.type == ("cpu" if is_interpreted() else "cuda")


@functools.cache
def kernels_for(device: torch.device) -> Kernels | None:
    """The kernels, if Triton is there and they do on `device` what they should; else a warning says why not."""
    with _host_may_wait(device):
        if device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.synchronize(device)  # an error of earlier work shows here, where nobody takes it for Triton's
        try:
            # Here: importing Triton takes time, and CPUs do not need it.
            from . import triton_copies, triton_matrices, triton_norms, triton_update

            modules = Kernels(triton_norms, triton_update, triton_matrices, triton_copies)
            kernels: Kernels | None = _tried(modules, device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no Triton, no C compiler for its launchers, a GPU that it does not support, …
            warnings.warn(
                f"hf_mars's Triton kernels do not run on {device} ({type(error).__name__}: {error}): steps there are "
                "composed of torch's kernels, as right but slower (docs/performance.md)",
                stacklevel=2,
            )
            kernels = None
    if is_one_of_several():
        logger.info(
            "this process %s the Triton kernels on %s; processes that hold the same parameters must do alike, which "
            "is compared for a process_group that the optimizer is given (MarsShampoo) alone",
            "does without" if kernels is None else "uses",
            device,
        )
    return kernels


@contextlib.contextmanager
def _host_may_wait(device: torch.device) -> Iterator[None]:
    """Inside, torch does not report that the host waits for the device (`torch.cuda.set_sync_debug_mode`)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _tried(kernels: Kernels, device: torch.device) -> Kernels:
    """The same. Raise an ArithmeticError unless they take a step of two tensors, one clipped, as torch does.

    MARS-Shampoo's with given updates: what Newton–Schulz makes of two roundings may be further apart than they are.
    """
    from .trial import trial_batch, trial_of_matrices, what_differs  # with formulas that only this needs

    batch, expected = trial_batch(device, BLOCK)
    matrices, expected_of_matrices, updates = trial_of_matrices(device, BLOCK)
    last_norms = LastNorms()
    for launch in _launches_of(kernels, [batch, matrices], last_norms):
        launch.measure(None)
        if isinstance(launch, MatrixLaunch):
            (run,) = launch.runs()
            launch.momentum(run, None)
            launch.move(run, updates, None)
        else:
            launch.update(None, last_norms)
    copies.swap(kernels, expected["parameter"], batch.params)
    copies.swap(kernels, expected["parameter"], batch.params)
    differs = what_differs(batch, expected) or what_differs(matrices, expected_of_matrices)
    if differs is not None:
        raise ArithmeticError(f"they compute another {differs} than torch's kernels do")
    return kernels


def split(batch: Batch) -> tuple[Batch | None, Batch | None, str | None]:
    """What of a batch `step` takes, what it leaves, and why it leaves that.

    It takes plain tensors on one GPU that lie in memory without gaps, where the choice of kernels is ours. Groups that
    get AdamW as it is are torch's, unless its kernels would need temporary copies.
    """
    why_not = _why_not(batch)
    if why_not is not None:
        return None, batch, why_not
    device = batch.params[0].device
    ranks = _ranks_that_agree(batch)
    if ranks:  # which are asked before anything is looked at that is this process's alone
        why_not = _why_not_there(device, ranks)
    plan = plan_of(batch)
    why_not = why_not or plan.why_not
    if why_not is None and kernels_for(device) is None:
        why_not = _why_not_there(device)
    if why_not is not None:
        return None, batch, why_not
    if not plan.left:
        return batch, None, None
    why_not = f"of {len(plan.left)} parameters not all tensors lie in memory alike and without gaps"
    if not plan.taken or _needs_an_exchange(batch):
        return None, batch, why_not
    return batch.subset(plan.taken), batch.subset(plan.left), why_not


def _ranks_that_agree(batch: Batch) -> list[Ranks]:
    """Groups of ranks that exchange norms, or that hold the same parameters: kernels and composition differ by
    rounding, and replicas that take different ones drift apart."""
    replicas = [] if batch.replicas is None else [batch.replicas]
    if batch.is_whole:
        return replicas
    return [*replicas, *dict.fromkeys(ranks for part in batch.parts for ranks in part.ranks)]


def _why_not_there(device: torch.device, ranks: Iterable[Ranks] = ()) -> str | None:
    runs_here = kernels_for(device) is not None
    if all_ranks_can("Triton kernels", runs_here, ranks, device):
        return None
    where = "on another rank (a warning there says why)" if runs_here else "there (a warning says why)"
    return f"Triton does not work {where}"


def _needs_an_exchange(batch: Batch) -> bool:
    return not batch.is_whole and batch.group["max_norm"] is not None


def _why_not(batch: Batch) -> str | None:
    """Why `step` takes nothing of a batch, as far as its settings and device say."""
    group = batch.group
    if group["update"] == "shampoo" and (why_not := _why_not_matrices(batch)) is not None:
        return why_not
    if group["foreach"] is not None or not group["fused"]:
        return f"foreach={group['foreach']}, fused={group['fused']}"
    if isinstance(group["lr"], Tensor):
        return "lr is a tensor"
    is_plain_adamw = group["update"] == "adamw" and batch.previous_grads is None and group["max_norm"] is None
    if is_plain_adamw and not needs_wide_copies(batch.params[0].dtype, group):
        return "plain AdamW has a fused one there"
    if is_captured(batch.params[0]):  # replayed, a graph would find other values where its table of addresses was
        return "a CUDA graph is captured"
    return None


def _why_not_matrices(batch: Batch) -> str | None:
    if batch.group["ns_steps"] is None:
        return "ns_steps=None"
    if not batch.is_whole or (batch.replicas is not None and batch.replicas.size() > 1):
        return "matrices are shared out among ranks"
    return None


def measure(batches: list[Batch], last_norms: LastNorms, skip: Skip) -> list[Launch]:
    """The clip's norms, which also say whether a gradient is not finite; see `execution.Execution`."""
    kernels = kernels_for(batches[0].params[0].device)
    assert kernels is not None
    launches = _launches_of(kernels, batches, last_norms)
    squares = _squares_of_wholes([launch for launch in launches if launch.is_spread], batches)
    flags: dict[torch.device, Tensor] = {}
    for launch in launches:
        flag = None
        if launch.group["max_norm"] is not None and not skip.covers(launch.group):
            if launch.device not in flags:  # one per device
                flags[launch.device] = torch.zeros((), dtype=torch.float32, device=launch.device)
            flag = flags[launch.device]
        launch.measure(flag, squares.get(launch))
    for flag in flags.values():
        skip.add_flag(flag)
    return launches


def _squares_of_wholes(launches: list[Launch], batches: list[Batch]) -> dict[Launch, Tensor]:
    """Σ c² of the tensors of launches whose tensors are spread over ranks, with one exchange between ranks.

    Which tensors are launched together may depend on the rank; the order in which sums are added up does not.
    """
    if not launches:
        return {}
    own: dict[tuple[int, int], Tensor] = {}
    for launch in launches:
        places = [(id(batch), i) for batch, i in launch.places]
        own.update(zip(places, launch.squares().unbind(), strict=True))
    chosen = [batch for batch in batches if _needs_an_exchange(batch)]
    order = [(id(batch), i) for batch in chosen for i in range(len(batch.params))]
    sums = add_up([own[place] for place in order], [part for batch in chosen for part in batch.parts])
    wholes = dict(zip(order, sums, strict=True))
    return {launch: torch.stack([wholes[id(batch), i] for batch, i in launch.places]) for launch in launches}


def step(batches: list[Batch], measured: list[Launch], last_norms: LastNorms, skip: Skip) -> None:
    """c_t, c̃_t, m_t (and v_t), the update, and g_t in the place of g_{t−1}; see `execution.Execution`."""
    for launch in measured:
        launch.update(skip.flag(launch.device), last_norms)


def _launches_of(kernels: Kernels, batches: list[Batch], last_norms: LastNorms) -> list[Launch]:
    """Those that update `batches`: those of equal settings together. Takes the known ‖g_{t−1}‖ of them."""
    plans = [batch.plan or plan_of(batch) for batch in batches]
    launches = []
    for some in _together(batches, plans):
        their_plans = tuple(batch.plan for batch in some)
        device = some[0].params[0].device
        kind = MatrixLaunch if some[0].group["update"] == "shampoo" else Launch
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        for table in tables_of(their_plans, stream, device):
            operands = operands_of(table, some[0], their_plans[0])
            launches.append(kind(kernels, some, operands, last_norms, stream))
    return launches


def _together(batches: list[Batch], plans: list[Plan]) -> Iterable[list[Batch]]:
    if len(batches) == 1:
        return [batches]
    together: dict[tuple, list[Batch]] = {}
    for batch, plan in zip(batches, plans, strict=True):
        together.setdefault(_key(batch, plan), []).append(batch)
    return together.values()


def _key(batch: Batch, plan: Plan) -> tuple:
    """Equal for batches that the same launches can update."""
    group = batch.group
    settings = (group["update"], batch.form, batch.previous_grads is None, group["gamma"], *group["betas"])
    rates = (group["lr"], group["weight_decay"], group["eps"], group["max_norm"], batch.lr, group["skip_nonfinite"])
    matrices = (group["layout"], group["ns_steps"], group["adjust_lr_fn"]) if group["update"] == "shampoo" else ()
    return batch.params[0].device, batch.is_whole, settings, rates, matrices, *plan.dtypes.items()


def takes(tensors: list[Tensor]) -> bool:
    """Whether `divide`, `swap` and `keep` can take these tensors, which are of one dtype on one device."""
    device = tensors[0].device
    return (
        not torch.compiler.is_compiling()
        and is_for(device)
        and all(t.is_contiguous() for t in tensors)
        and {type(t) for t in tensors} <= {Tensor, Parameter}
        and tensors[0].dtype in DTYPES
        and not is_captured(tensors[0])
        and kernels_for(device) is not None
    )


def divide(tensors: list[Tensor], divisors: Tensor) -> None:
    """Divide each tensor in place by its own number in the vector `divisors`, in one launch; a tensor is not read
    where that is 1. torch's functions of lists take a launch and two words per tensor there.
    """
    kernels = kernels_for(tensors[0].device)
    assert kernels is not None
    divide_by_launch(kernels, tensors, divisors)


def swap(tensors: list[Tensor], others: list[Tensor]) -> None:
    """Let tensors of one dtype change places with others of their shapes, bit for bit, in one launch."""
    kernels = kernels_for(tensors[0].device)
    assert kernels is not None
    copies.swap(kernels, tensors, others)


def keep(tensors: list[Tensor], others: list[Tensor], flag: Tensor | None) -> None:
    """Copy tensors of one dtype into others of their shapes, in one launch; not where `flag` is raised."""
    kernels = kernels_for(tensors[0].device)
    assert kernels is not None
    copies.keep(kernels, tensors, others, flag)
