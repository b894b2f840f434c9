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
import itertools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from communication_formulas import (
    ENGINES,
    FP32,
    VARIANTS,
    Model,
    backward_collectives,
    gradient_bytes,
    newton_schulz_flops,
    passing_bytes,
    sent_bytes,
    state_bytes,
    step_collectives,
    weight_bytes,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_mars import param_groups
from hf_mars.optim.groups import KINDS

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

    in_optimizer, take_step = CollectiveCounter(), optimizer.step

    def step():
        with in_optimizer:
            take_step()

    optimizer.step = step

    for update in range(3):
        # Engines settle their buckets in the first updates.
        in_backward, in_step = CollectiveCounter(), CollectiveCounter()
        with in_backward if update == 2 else contextlib.nullcontext():
            evaluate()
        gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
        in_optimizer.payload.clear()
        with in_step if update == 2 else contextlib.nullcontext():
            train.step() if engine.startswith("zero") else optimizer.step()
        if not engine.startswith("zero"):
            optimizer.zero_grad()
    if engine.startswith("zero"):
        # Without DeepSpeed's own norms and overflow flags, a few numbers.
        in_step.payload["all_reduce"] = in_optimizer.payload["all_reduce"]
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
        "step": dict(+in_step.payload),
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
            shared = sum(stack.largest_share(n)[1] for stack in model.stacks("ddp", n, shared=True))
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
