"""Draws loss curves of finished or running trainings, and in a second picture their MARS diagnostics.

`python -m hf_mars.plot OUTPUT_DIR [OUTPUT_DIR …] --output loss.png --diagnostics diagnostics.png`
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One panel each: its title, and per line its key in the log, its style and its name in the legend.
PANELS: tuple[tuple[str, dict[str, tuple[str, str]]], ...] = (
    ("‖κ (g_t − g_prev)‖ / ‖g_t‖", {"mars/correction_ratio": ("-", "")}),
    ("cosine of g_t and g_prev", {"mars/gradient_cosine": ("-", "")}),
    ("fraction of clipped tensors", {"mars/clipped_fraction": ("-", "")}),
    (
        "learning rate",
        {"mars/lr_matrix": ("-", "matrices"), "mars/lr_embedding": (":", "embeddings"), "mars/lr_1d": ("--", "1d")},
    ),
)
# Of another optimizer's runs: what every Trainer logs.
OTHER_PANELS: tuple[tuple[str, dict[str, tuple[str, str]]], ...] = (
    *((title, {}) for title, _ in PANELS[:-1]),
    (PANELS[-1][0], {"learning_rate": ("-", "")}),
)


def loss_history(output_dir: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Read the losses that a Trainer logged.

    Args:
        output_dir: a Trainer's output_dir. Its trainer_state.json is read, or that of its last checkpoint, whichever
            has the later step.

    Returns:
        {"loss": [(step, value), …], "eval_loss": […]}; a list may be empty. Losses are in nats per token.

    Raises:
        FileNotFoundError: there is no trainer_state.json.
    """
    return {key: _series(_log_history(output_dir), key) for key in ("loss", "eval_loss")}


def _log_history(output_dir: str | Path) -> list[dict[str, Any]]:
    output_dir = Path(output_dir)
    checkpoints = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    checkpoints.sort(key=lambda path: -int(path.name.split("-")[1]))
    files = [path for path in (folder / "trainer_state.json" for folder in checkpoints) if path.is_file()][:1]
    if (output_dir / "trainer_state.json").is_file():
        files.insert(0, output_dir / "trainer_state.json")
    if not files:
        raise FileNotFoundError(
            f"no trainer_state.json in {output_dir} or in a checkpoint of it: "
            "a Trainer writes it with each checkpoint (--save_steps), "
            "and at the end where its script calls trainer.save_state()"
        )
    states = [json.loads(file.read_text()) for file in files]
    return max(states, key=lambda state: state["global_step"])["log_history"]  # of equals the first


def _series(log: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in log if key in row]


def _labels(output_dirs: Sequence[str | Path]) -> list[str]:
    """Each run's folder name, preceded by as much of its path as tells it from the other runs."""
    runs = [Path(output_dir).resolve() for output_dir in output_dirs]

    def label(run: Path) -> str:
        others = [other for other in runs if other != run]
        lengths = range(1, len(run.parts) + 1)
        n = next(n for n in lengths if all(other.parts[-n:] != run.parts[-n:] for other in others))
        return str(Path(*run.parts[-n:]))

    return [label(run) for run in runs]


def plot_losses(output_dirs: Sequence[str | Path], path: str | Path) -> None:
    """Draw training losses (thin lines) and evaluation losses (dots) of runs over their steps into one picture.

    Args:
        output_dirs: Trainer output_dirs; their folders label the curves.
        path: the file to write; its suffix (.png, .svg, .pdf) decides the format.

    Raises:
        FileNotFoundError: see `loss_history`.
        ValueError: a run has logged no loss.
    """
    figure, axes = _figure(figsize=(7, 4.5))
    for i, (output_dir, label) in enumerate(zip(output_dirs, _labels(output_dirs), strict=True)):
        history = loss_history(output_dir)
        if not any(history.values()):
            raise ValueError(f"{output_dir} has no logged loss; train with --logging_steps, or evaluate")
        color = f"C{i}"
        if history["loss"]:
            axes.plot(
                *zip(*history["loss"], strict=True), color=color, linewidth=1, alpha=0.6, label=f"{label}: training"
            )
        if history["eval_loss"]:
            points = zip(*history["eval_loss"], strict=True)
            axes.plot(*points, color=color, marker="o", markersize=4, label=f"{label}: evaluation")
    drawn = [
        kind for kind in ("training", "evaluation") if any(line.get_label().endswith(kind) for line in axes.lines)
    ]
    axes.set_title(f"Loss of {' and '.join(drawn)}", fontsize="medium")
    _label_steps(axes)
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    _show_zeros(axes)
    figure.savefig(path, dpi=150)


def plot_diagnostics(output_dirs: Sequence[str | Path], path: str | Path) -> None:
    """Draw the MARS diagnostics of runs (docs/diagnostics.md) over their steps: four panels, one color per run.

    Of runs with other optimizers, which have none, the learning rate alone is drawn.

    Args:
        output_dirs: Trainer output_dirs; their folders label the colors.
        path: the file to write; its suffix (.png, .svg, .pdf) decides the format.

    Raises:
        FileNotFoundError: see `loss_history`.
        ValueError: no run has logged diagnostics.
    """
    figure, panels = _figure(2, 2, sharex=True, figsize=(9, 6))
    logs = [_log_history(output_dir) for output_dir in output_dirs]
    have_some = [any(_series(log, key) for _, lines in PANELS for key in lines) for log in logs]
    if not any(have_some):
        raise ValueError(f"{', '.join(map(str, output_dirs))}: no logged diagnostics; see docs/diagnostics.md")
    for i, (log, run, has_some) in enumerate(zip(logs, _labels(output_dirs), have_some, strict=True)):
        for axes, (_, lines) in zip(panels.flat, PANELS if has_some else OTHER_PANELS, strict=True):
            for key, (style, name) in lines.items():
                points = _series(log, key)
                if points:
                    label = f"{run}: {name}" if name else run
                    axes.plot(*zip(*points, strict=True), style, color=f"C{i}", linewidth=1, label=label)
    for axes, (title, _) in zip(panels.flat, PANELS, strict=True):
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
        if axes.lines:  # a form of MARS that keeps no g_{t−1} logs less
            axes.legend(fontsize="small")
            _show_zeros(axes)
    for axes in panels[-1]:
        _label_steps(axes)
    figure.savefig(path, dpi=150)


def _label_steps(axes: Any) -> None:
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _show_zeros(axes: Any) -> None:
    """An axis for curves that are zero throughout, which matplotlib would center between negative and positive."""
    if axes.dataLim.y0 == axes.dataLim.y1 == 0:
        axes.set_ylim(0, 1)


def _figure(rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **settings: Any) -> tuple[Figure, Any]:
    """A figure and its axes, outside of pyplot: it goes with its last reference, and no display is needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **settings)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the pictures that the command line asks for.

    Args:
        argv: the command line without the program's name; None: that of this process.

    Raises:
        SystemExit: code 2, where the arguments are wrong or a run has nothing to draw.
    """
    parser = argparse.ArgumentParser(prog="python -m hf_mars.plot", description="Draw loss curves of training runs.")
    parser.add_argument("output_dirs", nargs="+", metavar="OUTPUT_DIR", help="output_dir of a run")
    parser.add_argument("--output", default="loss.png", help="the picture to write (default: loss.png)")
    parser.add_argument("--diagnostics", metavar="PICTURE", help="also draw what MARS did into this picture")
    arguments = parser.parse_args(argv)
    try:
        plot_losses(arguments.output_dirs, arguments.output)
        print(f"wrote {arguments.output}")
        if arguments.diagnostics is not None:
            plot_diagnostics(arguments.output_dirs, arguments.diagnostics)
            print(f"wrote {arguments.diagnostics}")
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
