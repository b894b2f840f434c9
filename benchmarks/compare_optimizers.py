"""Train the same small GPT-2 on the packaged novel with several optimizers and print the losses they reached.

    python benchmarks/compare_optimizers.py                         # the table in docs/comparison.md
    python benchmarks/compare_optimizers.py --rows mars_m --learning_rates 3e-3 6e-3 --seeds 1 2
    python benchmarks/compare_optimizers.py --sweep --max_steps 100 --seeds 1 --output_dir out/sweep --plot sweep.png

Every run is one call of run_clm.py with the same text, steps, batches, schedule and clipping; only the optimizer, its
learning rate and the seed differ. Nothing is left out of the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

RUN_CLM = Path(__file__).parent.parent / "run_clm.py"

SHORT_BETAS = ["--adam_beta1", "0.9", "--adam_beta2", "0.95"]

# row -> (optimizer, learning rates of the default table, further arguments)
RUNS: dict[str, tuple[str, list[float], list[str]]] = {
    "adamw_torch": ("adamw_torch", [3e-3, 6e-3], SHORT_BETAS),
    "mars_adamw": ("mars_adamw", [3e-3, 6e-3], []),
    "mars_adamw_short_betas": ("mars_adamw", [3e-3, 6e-3], SHORT_BETAS),
    "mars_lion": ("mars_lion", [5e-4, 1e-3], ["--optim_args", "lr_1d=3e-3"]),
    "mars_shampoo": ("mars_shampoo", [1e-2, 2e-2], ["--optim_args", "lr_1d=6e-3"]),
    "mars_m": ("mars_m", [6e-3, 1.2e-2], []),
}

ADAMW_SWEEP = [7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2]
SWEEP: dict[str, list[float]] = {
    "adamw_torch": ADAMW_SWEEP,
    "mars_adamw": ADAMW_SWEEP,
    "mars_adamw_short_betas": ADAMW_SWEEP,
    "mars_lion": [2.5e-4, 5e-4, 1e-3, 2e-3],
    "mars_shampoo": [5e-3, 1e-2, 2e-2, 4e-2],
    "mars_m": [3e-3, 6e-3, 1.2e-2, 2.4e-2],
}


def run(row: str, learning_rate: float, seed: int, arguments: argparse.Namespace) -> dict:
    """One training; its results at the end."""
    optim, _, extra = RUNS[row]
    output_dir = Path(arguments.output_dir) / f"{row}-{learning_rate:g}-{seed}"
    results = output_dir / "all_results.json"
    if not results.is_file():  # an interrupted comparison goes on where it stopped
        command = [sys.executable, str(RUN_CLM), "--output_dir", str(output_dir), "--overwrite_output_dir"]
        command += ["--optim", optim, "--learning_rate", str(learning_rate), "--seed", str(seed), *extra]
        command += ["--max_steps", str(arguments.max_steps), "--warmup_steps", str(arguments.max_steps // 10)]
        command += ["--lr_scheduler_type", "cosine", "--weight_decay", "0.1", "--per_device_train_batch_size", "16"]
        command += ["--config_overrides", "resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0", "--disable_tqdm", "true"]
        command += ["--logging_steps", "20", "--save_strategy", "no", "--report_to", "none"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(results.read_text())


def table(rows: list[tuple[str, float, list[dict]]]) -> str:
    """A markdown table: mean and, for several seeds, smallest and largest evaluation loss of each setting."""
    lines = ["| | learning rate | seeds | evaluation loss | perplexity |", "| --- | --- | --- | --- | --- |"]
    for row, learning_rate, results in rows:
        losses = [result["eval_loss"] for result in results]
        spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
        perplexity = statistics.mean(result["eval_perplexity"] for result in results)
        lines.append(
            f"| {row} | {learning_rate:g} | {len(losses)} | {statistics.mean(losses):.3f}{spread} | {perplexity:.1f} |"
        )
    return "\n".join(lines)


def plot(rows: list[tuple[str, float, list[dict]]], path: str) -> None:
    """Draw the mean evaluation loss over the learning rate, one line for each row of the table's names."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row for row, *_ in rows):
        points = [
            (rate, statistics.mean(r["eval_loss"] for r in results)) for row, rate, results in rows if row == name
        ]
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, linewidth=1, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("evaluation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=RUNS, default=list(RUNS))
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--learning_rates", nargs="+", type=float, help="for every row, instead of its own")
    rates.add_argument("--sweep", action="store_true", help="more learning rates a row (docs/pictures.md)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--output_dir", default="out/compare")
    parser.add_argument("--plot", metavar="PICTURE", help="also draw loss against learning rate into this picture")
    arguments = parser.parse_args()
    rows = []
    for row in arguments.rows:
        for learning_rate in arguments.learning_rates or (SWEEP[row] if arguments.sweep else RUNS[row][1]):
            results = [run(row, learning_rate, seed, arguments) for seed in arguments.seeds]
            rows.append((row, learning_rate, results))
            print(f"{row} {learning_rate:g}: {[result['eval_loss'] for result in results]}", file=sys.stderr)
    print(table(rows))
    if arguments.plot is not None:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
