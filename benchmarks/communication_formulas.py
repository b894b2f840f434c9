"""The formulas of communication.py: bytes that a rank keeps, passes and sends, of each variant under each engine."""

import functools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hf_mars import MarsAdamW, MarsLion, MarsShampoo
from hf_mars.optim import parameter_roles
from hf_mars.optim.algorithm.lion import PIECE_ON_ACCELERATORS
from hf_mars.optim.algorithm.newton_schulz import MIN_BFLOAT16, WIDE
from hf_mars.optim.composed import ORTHOGONALISED_AT_A_TIME, SHARERS_AT_A_TIME
from hf_mars.optim.groups import KINDS
from hf_mars.optim.sharding import owners_of

FP64, FP32, BF16 = 8, 4, 2  # bytes
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
NOT_ZERO = ("ddp", "fsdp2")  # where there is exact mode
BOTH = ("matrix", "embedding")


@dataclass(frozen=True)
class Variant:
    """An optimizer, and what it keeps and exchanges.

    Attributes:
        make: param_groups → the optimizer.
        state: tensors of state, of a parameter's shape in float32, for each of KINDS.
        adamw: the kinds that also keep AdamW's step count, one float32.
        clipped: the kinds whose c_t is clipped by its norm.
        orthogonalizes: whether matrices go through Newton–Schulz.
        replicas: whether it is told the process group, and under DDP shares the matrices out among its ranks.
        evaluations: gradients an update.
        temporaries: tensors of the matrices' shapes that their elementwise work makes on accelerators.
        engines: under which it is counted.
    """

    make: Any
    state: tuple[int, int, int]
    adamw: tuple[str, ...] = KINDS
    clipped: tuple[str, ...] = ()
    orthogonalizes: bool = False
    replicas: bool = False
    evaluations: int = 1
    temporaries: int = 0
    engines: tuple[str, ...] = ENGINES


def shampoo(state, *, replicas=False, **settings):
    """The row of a MarsShampoo with these settings."""
    mars_m, exact = settings.get("adjust_lr_fn") == "match_rms_adamw", settings.get("exact", False)
    clips = settings.get("max_norm") is not None

    def make(groups):
        return MarsShampoo(groups, process_group=dist.group.WORLD if replicas else None, **settings)

    return Variant(
        make,
        state,
        adamw=("embedding", "1d"),
        clipped=() if not clips else ("matrix",) if mars_m else BOTH,
        orthogonalizes=True,
        replicas=replicas,
        evaluations=2 if exact else 1,
        temporaries=0 if clips or exact else 1,  # m_t, in the one-tensor form
        engines=("ddp",) if replicas else NOT_ZERO if exact else ENGINES,
    )


MARS_M = {"adjust_lr_fn": "match_rms_adamw"}
CLIP = {"max_norm": 1.0}
VARIANTS = {
    "adamw_torch": Variant(functools.partial(torch.optim.AdamW, fused=True), (2, 2, 2)),
    "mars_adamw": Variant(MarsAdamW, (3, 3, 2)),
    "mars_adamw max_norm=1": Variant(functools.partial(MarsAdamW, **CLIP), (3, 3, 2), clipped=BOTH),
    "mars_adamw exact": Variant(functools.partial(MarsAdamW, exact=True), (3, 3, 3), evaluations=2, engines=NOT_ZERO),
    # Its temporary tensor is sign(m_t); in the one-tensor form m_t is one too.
    "mars_lion": Variant(MarsLion, (1, 1, 2), adamw=("1d",), temporaries=2),
    "mars_lion max_norm=1": Variant(
        functools.partial(MarsLion, **CLIP), (2, 2, 2), adamw=("1d",), clipped=BOTH, temporaries=1
    ),
    "mars_lion exact": Variant(
        functools.partial(MarsLion, exact=True),
        (2, 2, 3),
        adamw=("1d",),
        evaluations=2,
        temporaries=1,
        engines=NOT_ZERO,
    ),
    "mars_shampoo": shampoo((1, 3, 2)),
    "mars_shampoo process_group=…": shampoo((1, 3, 2), replicas=True),
    "mars_shampoo max_norm=1": shampoo((2, 3, 2), **CLIP),
    "mars_shampoo exact": shampoo((2, 3, 3), exact=True),
    "mars_m": shampoo((1, 2, 2), **MARS_M),
    "mars_m process_group=…": shampoo((1, 2, 2), replicas=True, **MARS_M),
    "mars_m max_norm=1": shampoo((2, 2, 2), **CLIP, **MARS_M),
    "mars_m exact": shampoo((2, 3, 3), exact=True, **MARS_M),
}


@dataclass(frozen=True)
class Model:
    """The shapes of a model's parameters, by kind."""

    shapes: dict[str, list[torch.Size]]

    @classmethod
    def of(cls, model: nn.Module) -> "Model":
        shapes: dict[str, list[torch.Size]] = {kind: [] for kind in KINDS}
        for param, role in parameter_roles(model).items():
            shapes[role.kind].append(param.shape)
        return cls(shapes)

    def elements(self, kinds=KINDS, engine: str = "ddp", ranks: int = 1) -> int:
        """Parameters of these kinds that the fullest rank keeps where an engine shards them.

        FSDP2 gives every rank as many whole rows of a tensor, DeepSpeed as many elements; both pad what is left over.
        """
        shapes = [shape for kind in kinds for shape in self.shapes[kind]]
        if engine == "ddp":
            return sum(map(math.prod, shapes))
        if engine == "fsdp2":
            return sum(math.ceil(shape[0] / ranks) * math.prod(shape[1:]) for shape in shapes)
        return sum(math.ceil(math.prod(shape) / ranks) for shape in shapes)

    def stacks(self, engine: str, ranks: int, *, shared: bool) -> "list[Model]":
        """The matrices that are orthogonalised and applied before the next ones are."""
        stacks: list[Model] = []
        most = ORTHOGONALISED_AT_A_TIME * (min(ranks, SHARERS_AT_A_TIME) if shared else 1)
        elements = 0
        for shape in self.shapes["matrix"]:
            size = Model({"matrix": [shape]}).elements(["matrix"], engine, ranks)
            if not stacks or elements + size > most:
                stacks.append(Model({"matrix": []}))
                elements = 0
            stacks[-1].shapes["matrix"].append(shape)
            elements += size
        return stacks

    def largest_share(self, ranks: int) -> tuple[int, int]:
        """(elements, operations of Newton–Schulz) of the most of either on a rank that has its share of the matrices.

        A matrix is one rank's: the most expensive first, each to the rank with the least work so far.
        """
        shapes = self.shapes["matrix"]
        elements, flops = [0] * ranks, [0] * ranks
        for shape, owner in zip(shapes, owners_of(shapes, ranks), strict=True):
            elements[owner] += math.prod(shape)
            flops[owner] += newton_schulz_flops(shape)
        return max(elements), max(flops)

    def tensors(self, kinds) -> int:
        return sum(len(self.shapes[kind]) for kind in kinds)


def state_bytes(model: Model, variant: Variant, engine: str, ranks: int) -> int:
    """Bytes of optimizer state on a rank."""
    tensors = sum(n * model.elements([kind], engine, ranks) for kind, n in zip(KINDS, variant.state, strict=True))
    # DeepSpeed makes one flat tensor of each group, and a group is one kind.
    steps = len(variant.adamw) if engine.startswith("zero") else model.tensors(variant.adamw)
    return FP32 * (tensors + steps)


def weight_bytes(model: Model, engine: str, ranks: int) -> int:
    """Bytes of parameters on a rank, with the float32 copy that DeepSpeed updates."""
    whole, sharded = model.elements(), model.elements(engine=engine, ranks=ranks)
    return {
        "ddp": FP32 * whole,
        "fsdp2": FP32 * sharded,
        "zero1": BF16 * whole + FP32 * sharded,
        "zero2": BF16 * whole + FP32 * sharded,
        "zero3": (BF16 + FP32) * sharded,
    }[engine]


def gradient_bytes(model: Model, engine: str, ranks: int) -> int:
    """Bytes of gradients on a rank after backward; for ZeRO as its paper has them (arXiv:1910.02054)."""
    whole, sharded = model.elements(), model.elements(engine=engine, ranks=ranks)
    return {
        "ddp": 2 * FP32 * whole,  # DDP's buckets hold them a second time
        "fsdp2": FP32 * sharded,
        "zero1": BF16 * whole,
        "zero2": BF16 * sharded,
        "zero3": BF16 * sharded,
    }[engine]


def orthogonal_bytes(shape: torch.Size) -> int:
    """Bytes per element of what goes into Newton–Schulz and comes out of it, where there are units for bfloat16."""
    return BF16 if min(shape[-2:]) >= MIN_BFLOAT16 else FP32


def passing_bytes(model: Model, variant: Variant, engine: str, ranks: int) -> int:
    """Bytes on a rank that an update needs on top for a while, without those of Newton–Schulz itself."""
    gradient = FP32 * model.elements(engine=engine, ranks=ranks) if variant.evaluations == 2 else 0
    if not variant.orthogonalizes:
        return gradient + FP32 * variant.temporaries * min(
            PIECE_ON_ACCELERATORS, model.elements(["matrix"], engine, ranks)
        )
    return gradient + max(
        _passing_bytes_of_a_stack(stack, variant, engine, ranks)
        for stack in model.stacks(engine, ranks, shared=variant.replicas)
    )


def _passing_bytes_of_a_stack(stack: Model, variant: Variant, engine: str, ranks: int) -> int:
    mine, (share, _) = stack.elements(["matrix"], engine, ranks), stack.largest_share(ranks)
    if engine != "ddp":
        # Its parts of all results; of its matrices: pieces, wholes, results, those packed, and once more to send.
        results = mine + 5 * share
    else:
        results = mine + (2 * share if variant.replicas else 0)  # all results; its own also before it packs them
    size = max(map(orthogonal_bytes, stack.shapes["matrix"]))
    return FP32 * variant.temporaries * mine + size * results


def backward_collectives(model: Model, variant: Variant, engine: str, ranks: int) -> Counter:
    """Payload of the collectives of one micro-batch's forward and backward pass: bytes of the whole tensors."""
    size = ranks * model.elements(engine=engine, ranks=ranks)
    once = {
        "ddp": {"all_reduce": FP32 * model.elements()},
        "fsdp2": {"all_gather": 2 * BF16 * size, "reduce_scatter": BF16 * size},
        "zero1": {"all_reduce": BF16 * size},
        "zero2": {"all_reduce": BF16 * size},
        "zero3": {"all_gather": 2 * BF16 * size, "reduce_scatter": BF16 * size},
    }[engine]
    return Counter({collective: variant.evaluations * payload for collective, payload in once.items()})


def step_collectives(model: Model, variant: Variant, engine: str, ranks: int) -> Counter:
    """Payload of the collectives of one step(); of an all-to-all, what the fullest rank sends."""
    payload = Counter()
    if engine != "ddp":
        payload["all_reduce"] = FP64 * model.tensors(variant.clipped)  # squares of norms
    if engine in ("zero1", "zero2"):
        payload["all_gather"] = BF16 * ranks * model.elements(engine=engine, ranks=ranks)  # updated parameters
    if variant.orthogonalizes and engine != "ddp":
        # Pieces of the momentum to the rank that works on the matrix, and its results back.
        for stack in model.stacks(engine, ranks, shared=False):
            size = max(map(orthogonal_bytes, stack.shapes["matrix"]))
            share, _ = stack.largest_share(ranks)
            payload["all_to_all"] += size * (stack.elements(["matrix"], engine, ranks) + share)
    if variant.replicas and engine == "ddp":
        # Results, each from the rank that worked on it.
        payload["broadcast"] = sum(orthogonal_bytes(shape) * shape.numel() for shape in model.shapes["matrix"])
    return +payload


def sent_bytes(payload: Counter, ranks: int) -> float:
    """Bytes that each rank sends where collectives run over rings: an all-reduce is two of the others."""
    passes = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "broadcast": 1}
    return sum(passes[collective] * size for collective, size in payload.items()) * (ranks - 1) / ranks


def newton_schulz_flops(shape: torch.Size, steps: int = 5) -> int:
    """Floating-point operations of Newton–Schulz on one matrix, m ≤ n.

    4 m² n + 2 m³ an iteration; from n = WIDE m on, 4 m² n + 10 m³ for two.
    """
    m, n = sorted(shape[-2:])
    pairs = steps // 2 if n >= WIDE * m else 0
    return pairs * (4 * m * m * n + 10 * m**3) + (steps - 2 * pairs) * (4 * m * m * n + 2 * m**3)
