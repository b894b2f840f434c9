"""AdamW, mars_adamw and mars_m on GPT-2 small from scratch, on one GPU, in the minutes that you have.

    python benchmarks/pretrain_gpu.py --minutes 30 --text corpus.txt
    python benchmarks/pretrain_gpu.py --minutes 120 --text corpus.txt --learning_rate 7.5e-4 1.5e-3 3e-3 --seeds 2
    python benchmarks/pretrain_gpu.py --minutes 1 --tiny --max_steps 20      # a try, without a GPU

The protocol is that of `python -m hf_mars.sweep` (docs/sweep.md): every run has the same tokens in the same order and
a full schedule, and a failed or diverged one is counted. Each optimizer makes a few steps first, which tell how many
the minutes allow to all runs alike, evaluations included. bfloat16 autocast, updates of 131,072 tokens, the plan of
benchmarks/plans/pretrain_gpu.yaml. All runs are made in this process, one after the other, with the stock Trainer:
torch, transformers and accelerate are enough, with neither a network nor the compiled CPU step.

Every evaluation and every run is printed as a line of JSON when it ends. The output folder gets results.jsonl (a row
per run, in the sweep's format), report.md, report.json and, with matplotlib, the sweep's pictures.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before hf_mars is imported: the checkout need not be installed

import numpy as np
import torch
from pretrain_gpu_runs import Blocks, Task, make
from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import TrainerCallback

from hf_mars.sweep.errors import SweepError
from hf_mars.sweep.plan import Plan, Run, replace_text
from hf_mars.sweep.plan_file import make_plan, read_plan_file
from hf_mars.sweep.report import report
from hf_mars.sweep.store import RESULTS

NOVEL = ROOT / "hf_mars" / "data" / "pride_and_prejudice.txt"
PLAN = ROOT / "benchmarks" / "plans" / "pretrain_gpu.yaml"
HELD_OUT = 0.05  # of the text, at its end
EVALUATIONS = 10  # of each run, the last one at its end
MARGIN = 0.97  # of the time that is left after the first steps, since runs vary a little


class Size(NamedTuple):
    """How much there is of everything; tokens, blocks and steps."""

    model: dict[str, int]
    vocab_size: int
    block_size: int
    update: int  # blocks: 131,072 tokens
    device_batch: int  # blocks
    held_out: int  # blocks, at most
    first_steps: int  # that time an optimizer


SMALL = Size({}, 50_257, 1024, 128, 16, 256, 15)
TINY = Size({"n_layer": 1, "n_head": 2, "n_embd": 32}, 300, 32, 8, 4, 16, 6)


class PrintEvaluations(TrainerCallback):
    """A line of JSON for each evaluation."""

    def __init__(self, run: Run, tokens_per_step: int):
        self._tokens_per_step = tokens_per_step
        self._run = {"optimizer": run.setting.label, "learning_rate": run.setting.learning_rate, "seed": run.seed}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        tokens = state.global_step * self._tokens_per_step
        print_json({**self._run, "step": state.global_step, "tokens": tokens, "eval_loss": metrics["eval_loss"]})


def print_json(row: dict[str, Any]) -> None:
    print(json.dumps(row, ensure_ascii=False), flush=True)


def tokens_of(text: Path, vocab_size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The tokens to train on, those held out, and the size of the vocabulary.

    The byte-level BPE of a text is trained on the text without its held-out end. A `.bin` file holds tokens as nanoGPT
    writes them (uint16 without a header).
    """
    if text.suffix == ".bin":
        tokens = np.memmap(text, dtype=np.uint16, mode="r")
        cut = int(len(tokens) * (1 - HELD_OUT))
        return tokens[:cut], tokens[cut:], vocab_size
    words = text.read_text(encoding="utf-8")
    cut = words.rfind("\n", 0, int(len(words) * (1 - HELD_OUT))) + 1
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(parts(words[:cut], 2**16), vocab_size=vocab_size, show_progress=False)

    def encoded(words: str) -> np.ndarray:
        batches = (bpe.encode_batch(list(parts(batch, 2**16))) for batch in parts(words, 2**22))
        ids = [np.asarray(encoding.ids, dtype=np.uint16) for batch in batches for encoding in batch]
        return np.concatenate([np.empty(0, np.uint16), *ids])

    return encoded(words[:cut]), encoded(words[cut:]), bpe.get_vocab_size()


def parts(text: str, length: int) -> Iterator[str]:
    return (text[i : i + length] for i in range(0, len(text), length))


def size_for(arguments: argparse.Namespace) -> Size:
    """What the machine is to train.

    Raises:
        SweepError: no GPU; a batch that divides no update.
    """
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Trainer would take all that there are
    if not arguments.tiny and not torch.cuda.is_available():
        raise SweepError("there is no GPU that torch can use; with --tiny a tiny model is trained on the CPU")
    size = TINY if arguments.tiny else SMALL
    device_batch = arguments.device_batch or size.device_batch
    if size.update % device_batch:
        raise SweepError(f"--device_batch {device_batch}: must divide the {size.update} blocks of an update")
    return size._replace(device_batch=device_batch, vocab_size=arguments.vocab_size or size.vocab_size)


def plan_for(arguments: argparse.Namespace, command: list[str]) -> Plan:
    """The plan file's, with the command line's learning rates and seeds.

    Raises:
        SweepError: see `make_plan`.
    """
    file = read_plan_file(arguments.plan)
    return make_plan(
        command,
        file["optimizers"],
        arguments.learning_rate or file.get("learning_rate"),
        file.get("arguments"),
        seeds=arguments.seeds or file.get("seeds", 1),
        final_seeds=None,
        equal_budget=file.get("equal_budget", True),
    )


def prepare(text: Path, size: Size, on_gpu: bool, command: list[str]) -> Task:
    """Read the text.

    Raises:
        SweepError: it cannot be read, or is too short.
    """
    try:
        train, held_out, vocab_size = tokens_of(text, size.vocab_size)
    except (OSError, ValueError) as error:
        raise SweepError(f"--text {text} cannot be read: {error}") from None
    updates, evaluated = len(train) // (size.update * size.block_size), len(held_out) // size.block_size
    if not updates or not evaluated:
        raise SweepError(
            f"--text {text} is too short: {len(train):,} tokens to train on and {len(held_out):,} held out; at least "
            f"{size.update * size.block_size:,} and {size.block_size:,} are needed"
        )
    return Task(
        model=size.model,
        vocab_size=vocab_size,
        block_size=size.block_size,
        update=size.update,
        device_batch=size.device_batch,
        # Whole updates, so that each has as many tokens, at the end of an epoch too.
        train=Blocks(train, size.block_size, updates * size.update, vocab_size),
        held_out=Blocks(held_out, size.block_size, min(evaluated, size.held_out), vocab_size),
        on_gpu=on_gpu,
        command=command,
        git_commit=git_commit(),
    )


def git_commit() -> str | None:
    """The commit of the checkout; None for one without git."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def steps_for(plan: Plan, task: Task, first_steps: int, arguments: argparse.Namespace, began: float) -> int:
    """The steps that the minutes allow to each run, the same for all and a multiple of EVALUATIONS.

    Raises:
        SweepError: no optimizer makes its first steps, or the minutes do not suffice.
    """
    rows = {label: make(Run(plan.settings(label)[0], 1), task, first_steps, 1) for label in plan.optimizers}
    timed = {label: row for label, row in rows.items() if row["status"] != "failed"}
    if not timed:
        raise SweepError(f"no optimizer makes its first steps: {next(iter(rows.values()))['problem']}")
    each = others = 0.0  # seconds of one step of every run; of all that is no step
    for run in plan.runs():
        row = timed.get(run.setting.label) or next(iter(timed.values()))
        each += row["seconds_per_step"]
        others += row["wall_seconds"] - row["seconds"] + (EVALUATIONS - 1) * row["evaluation_seconds"]
    spent = time.monotonic() - began
    steps = int(((60 * arguments.minutes - spent) * MARGIN - others) / each)
    if steps < EVALUATIONS:
        needed = (spent + (others + EVALUATIONS * each) / MARGIN) / 60
        raise SweepError(
            f"--minutes {arguments.minutes:g} are too few: {EVALUATIONS} steps of each of the {len(plan.runs())} runs "
            f"take about {needed:.1f}, reading the text included"
        )
    return min(steps, arguments.max_steps or steps) // EVALUATIONS * EVALUATIONS


def run_all(arguments: argparse.Namespace, began: float) -> None:
    size = size_for(arguments)
    command = ["python", "benchmarks/pretrain_gpu.py", *sys.argv[1:]]
    plan, folder = plan_for(arguments, command), arguments.output_dir
    if (folder / RESULTS).exists():
        raise SweepError(f"--output_dir {folder} has a {RESULTS} already: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    task = prepare(Path(arguments.text), size, not arguments.tiny, command)
    steps = steps_for(plan, task, size.first_steps, arguments, began)
    tokens = steps * task.tokens_per_step
    passes = tokens / (len(task.train) * task.block_size)
    print(f"{len(plan.runs())} runs of {steps} steps, {tokens:,} tokens, {passes:.2f} times the text", file=sys.stderr)
    plan.save(folder)
    rows: list[dict[str, Any]] = []
    for run in plan.runs():
        row = make(run, task, steps, EVALUATIONS, PrintEvaluations(run, task.tokens_per_step))
        rows.append(row)
        replace_text(folder / RESULTS, "".join(json.dumps(row) + "\n" for row in rows))
        print_json({name: value for name, value in row.items() if name not in ("training", "stderr")})
    print(report(folder))
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes; {folder} has the results", file=sys.stderr)
    if all(row["status"] == "failed" for row in rows):
        raise SweepError(f"every run failed; {folder / 'report.md'} has their last lines")


def number(kind: Callable[[str], Any], least: float) -> Callable[[str], Any]:
    def checked(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be a number of at least {least:g}, not {text!r}")
        return value

    return checked


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=number(float, 0.1), required=True, help="in all, shared out over the runs")
    parser.add_argument("--text", default=NOVEL, help="UTF-8 text, or tokens in a .bin file (default: the novel)")
    parser.add_argument("--learning_rate", nargs="+", type=float, help="each of them for each optimizer")
    parser.add_argument("--seeds", type=number(int, 1), help="seeds 1 to this (default: the plan's)")
    parser.add_argument("--plan", default=PLAN, help="another plan file (docs/sweep.md)")
    parser.add_argument("--vocab_size", type=number(int, 257), help="of the BPE or the .bin file (default: 50257)")
    parser.add_argument("--device_batch", type=number(int, 1), help="blocks in a forward pass (default: 16)")
    parser.add_argument("--max_steps", type=number(int, EVALUATIONS), help="at most; in whole tens")
    parser.add_argument("--output_dir", type=Path, default=Path("out/pretrain_gpu"))
    parser.add_argument("--tiny", action="store_true", help="try it: a tiny model on the CPU")
    try:
        run_all(parser.parse_args(), began)
    except SweepError as error:
        sys.exit(f"pretrain_gpu.py: {error}")


if __name__ == "__main__":
    main()
