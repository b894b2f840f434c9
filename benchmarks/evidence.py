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
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLANS = ROOT / "benchmarks" / "plans"
RUN_CLM = ROOT / "run_clm.py"

# Of every task. On CPUs with bfloat16 units autocast saves a third of the time, and so does attention without a mask
# kernel at 128 tokens.
COMMON = """--use_cpu --bf16 --attn_implementation eager --per_device_train_batch_size 16 --eval_strategy steps
    --max_eval_samples 400 --save_strategy no --logging_steps 10 --report_to none --disable_tqdm true""".split()
NO_DROPOUT = ["--config_overrides", "resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0"]
SCRATCH = [*NO_DROPOUT, "--lr_scheduler_type", "cosine"]
# About 10M parameters with the tokenizer of 2,048 tokens.
TEN_MILLION = [
    "--config_overrides",
    "n_layer=6,n_embd=384,n_head=6,n_positions=128,resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0",
]
TUNED = ["--lr_scheduler_type", "linear", "--max_steps", "200", "--warmup_steps", "6", "--eval_steps", "50"]

SHORT = ["--block_size", "128", "--per_device_train_batch_size", "2", "--max_steps", "48", "--warmup_steps", "2"]
SHORT += ["--eval_steps", "48", "--max_eval_samples", "64"]

# task -> what run_clm.py is told besides COMMON; batches are of 16 × 128 tokens if nothing else is said
TASKS: dict[str, list[str]] = {
    "pretrain": [*SCRATCH, "--max_steps", "400", "--warmup_steps", "40", "--eval_steps", "100"],
    "ablations": [*SCRATCH, "--max_steps", "400", "--warmup_steps", "40", "--eval_steps", "100"],
    "shorter": [*SCRATCH, "--max_steps", "240", "--warmup_steps", "24", "--eval_steps", "60"],
    "long": [*SCRATCH, "--max_steps", "4000", "--warmup_steps", "400", "--eval_steps", "500"],
    "batch": [
        *[*SCRATCH, "--max_steps", "250", "--warmup_steps", "25", "--eval_steps", "50"],
        *["--gradient_accumulation_steps", "16"],
    ],
    "size": [
        *[*TEN_MILLION, "--lr_scheduler_type", "cosine"],
        *["--max_steps", "2000", "--warmup_steps", "200", "--eval_steps", "250"],
    ],
    "finetune": TUNED,
    "lora": [*TUNED, "--lora_r", "16"],
    # A real model, on CPUs: a few minutes a run.
    "finetune_real": [*SHORT, "--lr_scheduler_type", "linear"],
    "lora_real": [*SHORT, "--lr_scheduler_type", "linear", "--lora_r", "16"],
}
WITH_A_MODEL = ("finetune", "lora", "finetune_real", "lora_real")


def tokenizer_of(text: list[str], folder: Path) -> Path:
    """A byte-level BPE of 2,048 tokens for the text, trained once, so that the runs need not."""
    if not (folder / "tokenizer_config.json").is_file():
        command = [sys.executable, str(RUN_CLM), *text, "--max_steps", "1", "--do_train", "--output_dir", str(folder)]
        subprocess.run([*command, "--overwrite_output_dir"], check=True, stdout=subprocess.DEVNULL)
    return folder


def sweep(arguments: argparse.Namespace) -> list[str]:
    """The command of the task's sweep."""
    folder = Path(arguments.output_dir)
    text = ["--train_file", str(arguments.text)] if arguments.text else []
    if arguments.task in WITH_A_MODEL:
        model = ["--model_name_or_path", str(arguments.model)]
    else:
        model = ["--tokenizer_name", str(tokenizer_of(text, folder.with_name(folder.name + "_tokenizer")))]
    plan = PLANS / f"{arguments.plan or arguments.task}.yaml"
    return [
        *[sys.executable, "-m", "hf_mars.sweep", "--plan", str(plan), "--output_dir", str(folder)],
        *["--jobs", str(arguments.jobs), "--max_extensions", str(arguments.max_extensions)],
        *["--timing_steps", str(arguments.timing_steps), "--"],
        *[sys.executable, str(RUN_CLM), *text, *model, *COMMON, *TASKS[arguments.task]],
    ]


def kept(rows: list[dict[str, Any]]) -> str:
    """The rows of a sweep, one on each line, without training curves and without the names of folders."""
    unwanted = ("training", "folder", "stderr", "key")
    lines = []
    for row in rows:
        row = {name: value for name, value in row.items() if name not in unwanted}
        row["command"] = [Path(word).name if word.startswith("/") else word for word in row["command"]]
        row["evaluation"] = [[step, round(loss, 5), round(s, 2), n] for step, loss, s, n in row["evaluation"]]
        lines.append(json.dumps(row, ensure_ascii=False))
    return "[\n" + ",\n".join(lines) + "\n]\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--text", type=Path, help="the text to train on; its last 5 %% are held out")
    parser.add_argument("--model", type=Path, help="the pretrained model of finetune and lora")
    parser.add_argument("--plan", help="another plan of benchmarks/plans than the task's own")
    parser.add_argument("--output_dir", required=True, help="the sweep's folder")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--max_extensions", type=int, default=1, help="how often the grids may grow")
    parser.add_argument("--timing_steps", type=int, default=30, help="steps that time each best setting; 0: none")
    parser.add_argument("--keep", type=Path, help="train nothing: write the sweep's results to this file")
    arguments = parser.parse_args()
    if arguments.keep:
        from hf_mars.sweep.store import read_results

        arguments.keep.write_text(kept(read_results(Path(arguments.output_dir))), encoding="utf-8")
        return
    if (arguments.task in WITH_A_MODEL) != (arguments.model is not None):
        parser.error(f"--model {arguments.model}: {' and '.join(WITH_A_MODEL)} need one, the other tasks take none")
    sys.exit(subprocess.run(sweep(arguments)).returncode)


if __name__ == "__main__":
    main()
