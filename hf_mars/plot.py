"""Loss curves of finished or running trainings, as one picture.

``python -m hf_mars.plot OUTPUT_DIR [OUTPUT_DIR …] --output loss.png``
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path


def loss_history(output_dir: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Read the losses that a Trainer logged.

    Args:
        output_dir: a Trainer's output_dir. Its trainer_state.json is read, else that of its last checkpoint.

    Returns:
        {"loss": [(step, value), …], "eval_loss": […]}; a list may be empty. Losses are in nats per token.

    Raises:
        FileNotFoundError: there is no trainer_state.json.
    """
    output_dir = Path(output_dir)
    states = [output_dir / "trainer_state.json"]
    checkpoints = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    states += sorted((p / "trainer_state.json" for p in checkpoints), key=lambda p: -int(p.parent.name.split("-")[1]))
    for state in states:
        if state.is_file():
            log = json.loads(state.read_text())["log_history"]
            return {key: [(row["step"], row[key]) for row in log if key in row] for key in ("loss", "eval_loss")}
    raise FileNotFoundError(f"no trainer_state.json in {output_dir} or in a checkpoint of it")


def plot_losses(output_dirs: Sequence[str | Path], path: str | Path) -> None:
    """Draw training (thin) and evaluation losses (dots) of runs over their steps into one picture.

    Args:
        output_dirs: Trainer output_dirs; their folder names label the curves.
        path: the file to write; its suffix (.png, .svg, .pdf) decides the format.

    Raises:
        FileNotFoundError: see :func:`loss_history`.
        ValueError: a run has logged no loss.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for i, output_dir in enumerate(output_dirs):
        history = loss_history(output_dir)
        if not any(history.values()):
            raise ValueError(f"{output_dir} has no logged loss; train with --logging_steps, or evaluate")
        label, color = Path(output_dir).resolve().name, f"C{i}"
        if history["loss"]:
            axes.plot(
                *zip(*history["loss"], strict=True), color=color, linewidth=1, alpha=0.6, label=f"{label}: training"
            )
        if history["eval_loss"]:
            points = zip(*history["eval_loss"], strict=True)
            axes.plot(*points, color=color, marker="o", markersize=4, label=f"{label}: evaluation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hf_mars.plot", description="Draw loss curves of training runs.")
    parser.add_argument("output_dirs", nargs="+", metavar="OUTPUT_DIR", help="output_dir of a run")
    parser.add_argument("--output", default="loss.png", help="the picture to write (default: loss.png)")
    arguments = parser.parse_args(argv)
    try:
        plot_losses(arguments.output_dirs, arguments.output)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
