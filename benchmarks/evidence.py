"""The comparisons behind docs/comparison.md: sweeps over a text that is given, each kept as one file of results.

    python benchmarks/evidence.py pretrain --text prose.txt --output_dir out/prose
    python benchmarks/evidence.py pretrain --output_dir out/prose --keep benchmarks/results/pretrain_prose.json
    python benchmarks/evidence.py finetune --model out/model --text prose.txt --output_dir out/tuned

Each task is a plan of `python -m hf_mars.sweep` in benchmarks/plans/ and the arguments of run_clm.py below. Called
again, it goes on where it stopped. Without --text a task trains on the packaged novel, several times over.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from hf_mars.sweep.compare import ENOUGH_EVALUATIONS

ROOT = Path(__file__).resolve().parent.parent
PLANS = ROOT / "benchmarks" / "plans"
RUN_CLM = ROOT / "run_clm.py"

# Of every task. On CPUs with bfloat16 units autocast and eager attention together save a third of the time.
COMMON = """--use_cpu --attn_implementation eager --eval_strategy steps --save_strategy no --logging_steps 10
    --report_to none --disable_tqdm true""".split()
BATCH = ["--per_device_train_batch_size", "16", "--max_eval_samples", "400"]  # 16 × 128 tokens
NO_DROPOUT = "resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0"


class Task(NamedTuple):
    """What is trained.

    Attributes:
        plan: the file of benchmarks/plans, without its ending, unless --plan names another one.
        arguments: of run_clm.py, besides COMMON.
        takes_a_model: whether --model is tuned; else a new model is trained from scratch.
    """

    plan: str
    arguments: list[str]
    takes_a_model: bool = False


def from_scratch(plan: str, steps: int, eval_steps: int, *others: str, size: str = "") -> Task:
    """The small GPT-2 of run_clm.py, or one of another size, with a tenth of the steps as warmup."""
    schedule = ["--max_steps", str(steps), "--warmup_steps", str(steps // 10), "--lr_scheduler_type", "cosine"]
    model = ["--config_overrides", size + NO_DROPOUT]
    return Task(plan, [*model, *BATCH, *schedule, "--eval_steps", str(eval_steps), *others])


def tuned(plan: str, *others: str) -> Task:
    schedule = ["--max_steps", "200", "--warmup_steps", "6", "--lr_scheduler_type", "linear", "--eval_steps", "50"]
    return Task(plan, [*BATCH, *schedule, *others], takes_a_model=True)


def tuned_shortly(plan: str, *others: str) -> Task:
    """For models of 100M parameters and more: a few minutes a run."""
    schedule = ["--max_steps", "48", "--warmup_steps", "2", "--lr_scheduler_type", "linear", "--eval_steps", "48"]
    batch = ["--block_size", "128", "--per_device_train_batch_size", "2", "--max_eval_samples", "64"]
    return Task(plan, [*batch, *schedule, *others], takes_a_model=True)


TASKS = {
    "pretrain": from_scratch("pretrain", 400, 100),
    "shorter": from_scratch("shorter", 240, 60),
    "exact": from_scratch("exact", 200, 50),  # twice the gradients per step: as long as 400 steps
    "novel": from_scratch("novel", 300, 100),
    "long": from_scratch("long", 4000, 500),
    "batch": from_scratch("long", 250, 50, "--gradient_accumulation_steps", "16"),
    # About 10M parameters with the tokenizer of 2,048 tokens.
    "size": from_scratch("size", 400, 100, size="n_layer=6,n_embd=384,n_head=6,n_positions=128,"),
    "finetune": tuned("finetune"),
    "lora": tuned("lora", "--lora_r", "16"),
    "finetune_real": tuned_shortly("finetune_real"),
    "lora_real": tuned_shortly("lora_real", "--lora_r", "16"),
}


def tokenizer_of(text: list[str], folder: Path) -> Path:
    """A byte-level BPE of 2,048 tokens for the text, trained once, so that the runs need not."""
    if not (folder / "tokenizer_config.json").is_file():
        command = [sys.executable, str(RUN_CLM), *text, "--max_steps", "1", "--do_train", "--output_dir", str(folder)]
        subprocess.run([*command, "--overwrite_output_dir"], check=True, stdout=subprocess.DEVNULL)
    return folder


def sweep(arguments: argparse.Namespace) -> list[str]:
    """The command of the task's sweep."""
    task, folder = TASKS[arguments.task], Path(arguments.output_dir)
    text = ["--train_file", str(arguments.text)] if arguments.text else []
    if task.takes_a_model:
        model = ["--model_name_or_path", str(arguments.model)]
    else:
        model = ["--tokenizer_name", str(tokenizer_of(text, folder.with_name(folder.name + "_tokenizer")))]
    plan = PLANS / f"{arguments.plan or task.plan}.yaml"
    return [
        *[sys.executable, "-m", "hf_mars.sweep", "--plan", str(plan), "--output_dir", str(folder)],
        *["--jobs", str(arguments.jobs), "--max_extensions", str(arguments.max_extensions)],
        *["--timing_steps", str(arguments.timing_steps), "--"],
        *[sys.executable, str(RUN_CLM), *text, *model, *COMMON, *["--bf16"] * arguments.bf16, *task.arguments],
    ]


def kept(rows: list[dict[str, Any]]) -> str:
    """The rows of a sweep, one on each line, without the names of folders; training curves where no others serve."""
    lines = []
    for row in rows:
        unwanted = ["folder", "stderr", "key"] + ["training"] * (len(row["evaluation"]) >= ENOUGH_EVALUATIONS)
        row = {name: value for name, value in row.items() if name not in unwanted}
        row["command"] = [Path(word).name if word.startswith("/") else word for word in row["command"]]
        row["evaluation"] = [[step, round(loss, 5), round(s, 2), n] for step, loss, s, n in row["evaluation"]]
        lines.append(json.dumps(row, ensure_ascii=False))
    return "[\n" + ",\n".join(lines) + "\n]\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--text", type=Path, help="the text to train on; its last 5 %% are held out")
    parser.add_argument("--model", type=Path, help="the pretrained model, for the tasks that tune one")
    parser.add_argument("--plan", help="another plan of benchmarks/plans than the task's own")
    parser.add_argument("--output_dir", required=True, help="the sweep's folder")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--max_extensions", type=int, default=1, help="how often the grids may grow")
    parser.add_argument("--timing_steps", type=int, default=30, help="steps that time each best setting; 0: none")
    parser.add_argument("--no-bf16", dest="bf16", action="store_false", help="float32: faster where CPUs lack units")
    parser.add_argument("--keep", type=Path, help="train nothing: write the sweep's results to this file")
    arguments = parser.parse_args()
    if arguments.keep:
        from hf_mars.sweep.store import read_results

        arguments.keep.write_text(kept(read_results(Path(arguments.output_dir))), encoding="utf-8")
        return
    if TASKS[arguments.task].takes_a_model != (arguments.model is not None):
        tuned_tasks = ", ".join(name for name, task in TASKS.items() if task.takes_a_model)
        parser.error(f"--model {arguments.model}: {tuned_tasks} need one, the other tasks take none")
    sys.exit(subprocess.run(sweep(arguments)).returncode)


if __name__ == "__main__":
    main()
