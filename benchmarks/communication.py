"""Bytes that a rank keeps and sends with each variant and engine: formulas, counts, and what they predict.

    python benchmarks/communication.py                   # the predictions, as in docs/scaling.md
    python benchmarks/communication.py docs/scaling.md   # write them there
    torchrun --nproc_per_node 2 benchmarks/communication.py --count ddp    # count, on CPUs, and print as JSON

The counts are of a small Llama in bfloat16 mixed precision, which the files in docs/launch/ set. Engines are ddp,
fsdp2, zero1, zero2 and zero3 (these with DeepSpeed, and DS_ACCELERATOR=cpu where there is no GPU).
tests/engines/test_scaling.py compares them with the formulas, to the byte.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_mars import MarsAdamW, MarsLion, MarsShampoo, param_groups
from hf_mars.optim import parameter_roles
from hf_mars.optim.algorithm.newton_schulz import WIDE
from hf_mars.optim.groups import KINDS
from hf_mars.optim.sharding import owners_of

FP32, BF16 = 4, 2  # bytes
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


# ---- formulas ----


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
    mars_m = settings.get("adjust_lr_fn") == "match_rms_adamw"
    clipped = () if settings.get("max_norm", 1.0) is None else ("matrix",) if mars_m else ("matrix", "embedding")

    def make(groups):
        return MarsShampoo(groups, process_group=dist.group.WORLD if replicas else None, **settings)

    return Variant(
        make,
        state,
        adamw=("embedding", "1d"),
        clipped=clipped,
        orthogonalizes=True,
        replicas=replicas,
        evaluations=2 if settings.get("exact") else 1,
        temporaries=1 if settings.get("max_norm", 1.0) is None else 0,  # m_t
        engines=("ddp",) if replicas else ("ddp", "fsdp2"),
    )


BOTH = ("matrix", "embedding")
MARS_M = {"adjust_lr_fn": "match_rms_adamw"}
VARIANTS = {
    "adamw_torch": Variant(functools.partial(torch.optim.AdamW, fused=True), (2, 2, 2)),
    "mars_adamw": Variant(MarsAdamW, (3, 3, 2), clipped=BOTH, engines=("ddp", "fsdp2")),
    "mars_adamw max_norm=none": Variant(functools.partial(MarsAdamW, max_norm=None), (3, 3, 2)),
    "mars_adamw exact": Variant(
        functools.partial(MarsAdamW, exact=True), (3, 3, 3), clipped=BOTH, evaluations=2, engines=("ddp", "fsdp2")
    ),
    "mars_lion": Variant(  # its temporary tensor is sign(m_t), without the clip m_t is one too
        MarsLion, (2, 2, 2), adamw=("1d",), clipped=BOTH, temporaries=1, engines=("ddp", "fsdp2")
    ),
    "mars_lion max_norm=none": Variant(
        functools.partial(MarsLion, max_norm=None), (1, 1, 2), adamw=("1d",), temporaries=2
    ),
    "mars_lion exact": Variant(
        functools.partial(MarsLion, exact=True),
        (2, 2, 3),
        adamw=("1d",),
        clipped=BOTH,
        evaluations=2,
        temporaries=1,
        engines=("ddp", "fsdp2"),
    ),
    "mars_shampoo": shampoo((2, 3, 2)),
    "mars_shampoo process_group=…": shampoo((2, 3, 2), replicas=True),
    "mars_shampoo max_norm=none": shampoo((1, 3, 2), max_norm=None),
    "mars_shampoo exact": shampoo((2, 3, 3), exact=True),
    "mars_m": shampoo((2, 2, 2), **MARS_M),
    "mars_m process_group=…": shampoo((2, 2, 2), replicas=True, **MARS_M),
    "mars_m max_norm=none": shampoo((1, 2, 2), max_norm=None, **MARS_M),
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


def passing_bytes(model: Model, variant: Variant, engine: str, ranks: int) -> int:
    """Bytes on a rank that an update needs on top for a while, without those of Newton–Schulz itself."""
    mine = model.elements(["matrix"], engine, ranks)
    tensors = variant.temporaries * mine
    if variant.evaluations == 2:
        tensors += model.elements(engine=engine, ranks=ranks)  # the gradient at the previous point
    if variant.orthogonalizes:
        share, _ = model.largest_share(ranks)
        if engine == "fsdp2":
            tensors += (
                mine + 5 * share
            )  # of its matrices: shards, wholes, results, those packed, and once more to send
        else:
            tensors += mine + (2 * share if variant.replicas else 0)  # all results; its own also before it packs them
    return FP32 * tensors


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
    share, _ = model.largest_share(ranks)
    if engine == "fsdp2":
        payload["all_reduce"] = FP32 * model.tensors(variant.clipped)  # norms
    if engine in ("zero1", "zero2"):
        payload["all_gather"] = BF16 * ranks * model.elements(engine=engine, ranks=ranks)  # updated parameters
    if variant.orthogonalizes and engine == "fsdp2":
        # Shards of the momentum to the rank that works on the matrix, and its results back.
        payload["all_to_all"] = FP32 * (model.elements(["matrix"], engine, ranks) + share)
    if variant.replicas and engine == "ddp":
        payload["broadcast"] = FP32 * model.elements(["matrix"])  # results, each from the rank that worked on it
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


# ---- counts ----

COLLECTIVES = {  # operator → collective, and which of its tensors is the whole payload
    "c10d::allreduce_": ("all_reduce", max),
    "c10d::_allgather_base_": ("all_gather", max),
    "c10d::allgather_": ("all_gather", sum),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", max),
    "c10d::alltoall_base_": ("all_to_all", max),
    "c10d::broadcast_": ("broadcast", max),
    "_c10d_functional::all_reduce": ("all_reduce", max),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", max),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", max),
    "_c10d_functional::all_to_all_single": ("all_to_all", max),
}


class CollectiveCounter(TorchDispatchMode):
    """Counts the payload of every collective in bytes; ``payload`` maps its kind to the sum.

    Raises:
        NotImplementedError: a collective that COLLECTIVES does not list.
    """

    def __init__(self):
        super().__init__()
        self.payload: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # let it become operations on local tensors first
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.name() and "wrap" not in func.name():
            name = func.name().split(".")[0]
            if name not in COLLECTIVES:
                raise NotImplementedError(f"{name} is not counted; add it to COLLECTIVES")
            collective, whole = COLLECTIVES[name]
            tensors = [t.nbytes for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
            self.payload[collective] += whole(tensors)
        return result


def small_llama() -> nn.Module:
    """No row count is odd, none of 4 ranks has an empty or shorter shard: counts are then exact multiples."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=False,
        )
    )


def count(engine: str, name: str) -> dict[str, Any]:
    """Train the small Llama for three updates under an engine and count the last. Every rank of the job calls this.

    Returns:
        bytes of "state", "weights" and "gradients" on this rank (None where DeepSpeed keeps them to itself), and the
        payloads of the collectives of "backward" (forward included) and "step".
    """
    variant = VARIANTS[name]
    model = small_llama()
    train = model
    if engine == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    optimizer = variant.make(param_groups(model, weight_decay=0.1))
    if engine == "ddp":
        train = DistributedDataParallel(model, broadcast_buffers=False)
    if engine.startswith("zero"):
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": int(engine[-1]),
                # As for a model whose layers are too large to be kept.
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0,
                "stage3_prefetch_bucket_size": 0,
            },
        }
        train, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    tokens = torch.arange(16).view(2, 8) + dist.get_rank()

    def backward():
        with torch.autocast("cpu", torch.bfloat16, enabled=engine == "ddp"):
            loss = train(input_ids=tokens, labels=tokens).loss
        train.backward(loss) if engine.startswith("zero") else loss.backward()

    def evaluate():
        if variant.evaluations == 2:
            with optimizer.previous_point():
                backward()
        backward()

    for update in range(3):
        # Engines settle their buckets in the first updates.
        in_backward, in_step = CollectiveCounter(), CollectiveCounter()
        with in_backward if update == 2 else contextlib.nullcontext():
            evaluate()
        gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
        with in_step if update == 2 else contextlib.nullcontext():
            train.step() if engine.startswith("zero") else optimizer.step()
        if not engine.startswith("zero"):
            optimizer.zero_grad()
    if engine.startswith("zero"):
        in_step.payload.pop("all_reduce", None)  # DeepSpeed's own norms and overflow flags, a few numbers
    weights = [getattr(p, "ds_tensor", local(p)) for p in model.parameters()]
    if engine.startswith("zero"):
        stage_3 = engine == "zero3"
        weights += (
            train.optimizer.fp32_partitioned_groups_flat
            if stage_3
            else train.optimizer.single_partition_of_fp32_groups
        )
    states = [local(t) for state in optimizer.state.values() for t in state.values()]
    return {
        "state": sum(t.nbytes for t in states),
        "weights": sum(t.nbytes for t in weights),
        "gradients": sum(t.nbytes for t in gradients) if engine in ("ddp", "fsdp2") else None,
        "backward": dict(in_backward.payload),
        "step": dict(in_step.payload),
    }


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def formulas(engine: str, name: str, ranks: int) -> dict[str, Any]:
    """What count() returns, by the formulas."""
    model, variant = Model.of(small_llama()), VARIANTS[name]
    buckets = FP32 * model.elements() if engine == "ddp" else 0
    return {
        "state": state_bytes(model, variant, engine, ranks),
        "weights": weight_bytes(model, engine, ranks),
        "gradients": gradient_bytes(model, engine, ranks) - buckets if engine in ("ddp", "fsdp2") else None,
        "backward": dict(backward_collectives(model, variant, engine, ranks)),
        "step": dict(step_collectives(model, variant, engine, ranks)),
    }


# ---- predictions ----

RANKS = (8, 64, 512)
TOKENS = 480 * 1024  # an update of the paper's GPT-2 runs
SPEED = 100e12  # operations per second, where a bandwidth is compared with them
BEGIN, END = "<!-- python benchmarks/communication.py -->\n", "<!-- end -->\n"


def real_models() -> dict[str, nn.Module]:
    """The models of the tables, without memory for their weights."""
    with torch.device("meta"):
        return {
            "GPT-2 XL": GPT2LMHeadModel(GPT2Config(n_embd=1600, n_layer=48, n_head=25)),
            "Llama-2-7B": LlamaForCausalLM(LlamaConfig()),  # its defaults are that model's
        }


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def gigabytes(values) -> str:
    """Numbers of bytes as GB (10⁹ bytes), three digits each; one where all agree."""
    shown = ["< 0.001" if 0 < value < 1e6 else f"{value / 1e9:.3g}" for value in values]
    return shown[0] if len(set(shown)) == 1 else " / ".join(shown)


def predictions() -> str:
    """The tables of docs/scaling.md."""
    text = ""
    for model_name, module in real_models().items():
        model = Model.of(module)
        text += f"### {model_name}\n\n"
        kinds = ", ".join(f"{model.elements([kind]) / 1e6:,.1f}M {kind}" for kind in KINDS)
        text += f"{model.elements() / 1e6:,.0f}M parameters: {kinds}.\n\n"

        def cells(function, variant, model=model):
            for engine in ENGINES:
                used = engine in variant.engines
                yield gigabytes(function(model, variant, engine, n) for n in RANKS) if used else "–"

        def memory(model, variant, engine, n):
            kept = weight_bytes(model, engine, n) + gradient_bytes(model, engine, n)
            return kept + state_bytes(model, variant, engine, n)

        def step_traffic(model, variant, engine, n):
            return sent_bytes(step_collectives(model, variant, engine, n), n)

        def backward_traffic(model, variant, engine, n):
            return sent_bytes(backward_collectives(model, variant, engine, n), n)

        tables = {
            "GB kept on a rank": memory,
            "GB more on a rank for a while": passing_bytes,
            "GB sent by a rank in step()": step_traffic,
        }
        for title, function in tables.items():
            rows = [[f"`{name}`", *cells(function, variant)] for name, variant in VARIANTS.items()]
            text += table([title, *ENGINES], rows)
        rows = [
            [label, *cells(backward_traffic, VARIANTS[name])]
            for label, name in (("approximate forms", "adamw_torch"), ("exact forms", "mars_adamw exact"))
        ]
        text += table(["GB sent by a rank in forward and backward of a micro-batch", *ENGINES], rows)
        flops = sum(map(newton_schulz_flops, model.shapes["matrix"]))
        rows = []
        for n in RANKS:
            shared = model.largest_share(n)[1]
            counts = [6 * model.elements() * TOKENS / n, flops, shared]
            seconds = (flops - shared) / SPEED
            break_even = step_traffic(model, VARIANTS["mars_shampoo process_group=…"], "ddp", n) / seconds
            rows.append([str(n), *(f"{count / 1e12:,.1f}" for count in counts), f"{break_even / 1e9:.0f}"])
        ways = "Newton–Schulz on every rank", "Newton–Schulz shared out", "GB/s at which sharing breaks even"
        text += table(["TFLOP of a rank, of so many", "forward and backward", *ways], rows)
    return text


def write(path: Path) -> None:
    """Replace the tables between the two marks in a file."""
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    path.write_text(before + BEGIN + "\n" + predictions() + END + rest.split(END)[1], encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", nargs="?", type=Path, help="a file with the tables, to be written anew")
    parser.add_argument("--count", nargs="+", choices=ENGINES, metavar="ENGINE", help="count instead, under torchrun")
    arguments = parser.parse_args()
    if arguments.path:
        write(arguments.path)
    elif not arguments.count:
        print(predictions(), end="")
    else:
        dist.init_process_group("gloo")
        rows = [
            {"engine": engine, "variant": name, "ranks": dist.get_world_size(), **count(engine, name)}
            for engine, name in itertools.product(arguments.count, VARIANTS)
            if engine in VARIANTS[name].engines
        ]
        if dist.get_rank() == 0:
            print(json.dumps(rows), flush=True)
        dist.barrier()
        os._exit(0)  # gloo can hang when a process group is torn down after DDP


if __name__ == "__main__":
    main()
