"""Loss curves from trainer_state.json."""

import json

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_mars import plot

LOG = [
    {"step": 1, "loss": 5.0},
    {"step": 2, "loss": 4.0},
    {"step": 2, "eval_loss": 4.5},
    {"step": 2, "train_loss": 4.4},
]


def write_state(folder, log=LOG):
    folder.mkdir(parents=True, exist_ok=True)
    step = log[-1]["step"] if log else 0
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))


@pytest.fixture
def drawn(monkeypatch):
    """Each line drawn: its label and its points."""
    lines = []
    plot_line = Axes.plot

    def record(axes, x, y, *style, label, **settings):
        lines.append((label, [*zip(x, y, strict=True)]))
        return plot_line(axes, x, y, *style, label=label, **settings)

    monkeypatch.setattr(Axes, "plot", record)
    return lines


def test_history_of_a_finished_run(tmp_path):
    write_state(tmp_path)
    assert plot.loss_history(tmp_path) == {"loss": [(1, 5.0), (2, 4.0)], "eval_loss": [(2, 4.5)]}


def test_history_of_a_running_one_is_its_last_checkpoints(tmp_path):
    for step in (5, 10):
        write_state(tmp_path / f"checkpoint-{step}", [{"step": step, "loss": float(step)}])
    assert plot.loss_history(tmp_path)["loss"] == [(10, 10.0)]


def test_the_furthest_state_is_drawn(tmp_path):
    """A resumed run has checkpoints that are newer than what an earlier training left in output_dir."""
    write_state(tmp_path)
    write_state(tmp_path / "checkpoint-5", [{"step": 5, "loss": 5.0}])
    assert plot.loss_history(tmp_path)["loss"] == [(5, 5.0)]
    write_state(tmp_path, [{"step": 5, "loss": 5.0}, {"step": 5, "eval_loss": 6.0}])  # as a finished run leaves it
    assert plot.loss_history(tmp_path)["eval_loss"] == [(5, 6.0)]


def test_several_runs_make_one_picture(tmp_path, capsys, drawn):
    write_state(tmp_path / "a")
    write_state(tmp_path / "b", LOG[:2])
    plot.main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "loss.png")])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    training, evaluation = [(1, 5.0), (2, 4.0)], [(2, 4.5)]
    assert drawn == [("a: training", training), ("a: evaluation", evaluation), ("b: training", training)]


@pytest.mark.parametrize(
    "folders, labels",
    [
        (["x/a", "x/b"], ["a", "b"]),
        (["x/out", "y/out"], ["x/out", "y/out"]),
        (["x/1/out", "y/1/out", "z"], ["x/1/out", "y/1/out", "z"]),
        (["x/out", "x/out"], ["out", "out"]),
    ],
    ids=str,
)
def test_runs_are_told_apart_by_as_much_of_their_path_as_it_takes(tmp_path, capsys, drawn, folders, labels):
    for folder in folders:
        write_state(tmp_path / folder, MARS_LOG[:1])
    pictures = ["--output", str(tmp_path / "l.svg"), "--diagnostics", str(tmp_path / "d.svg")]
    plot.main([*(str(tmp_path / folder) for folder in folders), *pictures])
    names = [label.removesuffix(": training").removesuffix(": matrices") for label, _ in drawn]
    assert list(dict.fromkeys(names)) == list(dict.fromkeys(labels)) and len(names) == 4 * len(labels)


MARS_LOG = [
    {"step": 1, "loss": 5.0, "mars/correction_ratio": 0.0, "mars/clipped_fraction": 0.5, "mars/lr_matrix": 0.2},
    {"step": 2, "loss": 4.0, "mars/correction_ratio": 0.7, "mars/gradient_cosine": 0.1, "mars/lr_matrix": 0.1},
]


def test_diagnostics_make_another_picture(tmp_path, capsys, drawn):
    write_state(tmp_path / "a", MARS_LOG)
    write_state(tmp_path / "b", MARS_LOG[:1])
    pictures = [str(tmp_path / name) for name in ("loss.png", "diagnostics.png")]
    plot.main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", pictures[0], "--diagnostics", pictures[1]])
    assert capsys.readouterr().out == "".join(f"wrote {picture}\n" for picture in pictures)
    assert (tmp_path / "diagnostics.png").read_bytes().startswith(b"\x89PNG")
    a = [("a", [(1, 0.0), (2, 0.7)]), ("a", [(2, 0.1)]), ("a", [(1, 0.5)]), ("a: matrices", [(1, 0.2), (2, 0.1)])]
    assert drawn[2:] == [*a, ("b", [(1, 0.0)]), ("b", [(1, 0.5)]), ("b: matrices", [(1, 0.2)])]


def test_a_run_with_another_optimizer_is_drawn_beside_them(tmp_path, capsys, drawn):
    """AdamW logs no diagnostics; its learning rate, which every Trainer logs, is compared with MARS's."""
    write_state(tmp_path / "mars", MARS_LOG)
    write_state(tmp_path / "adamw", [{"step": 1, "loss": 5.0, "learning_rate": 0.1}])
    plot.plot_diagnostics([tmp_path / "mars", tmp_path / "adamw"], tmp_path / "d.png")
    assert [line for line in drawn if line[0].startswith("adamw")] == [("adamw", [(1, 0.1)])]


@pytest.mark.parametrize("picture", [plot.plot_losses, plot.plot_diagnostics])
def test_a_curve_of_zeros_lies_on_the_ground(tmp_path, monkeypatch, picture):
    """An axis from −0.05 to 0.05 would show a fraction below zero."""
    zeros = {"loss": 0.0, "mars/clipped_fraction": 0.0}
    write_state(tmp_path, [{"step": step, **zeros} for step in (1, 2)])
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    picture([tmp_path], tmp_path / "p.png")
    limits = [axes.get_ylim() for axes in figures[0].axes if axes.lines]
    assert limits == [(0.0, 1.0)]


@pytest.mark.parametrize(
    ("log", "title"),
    [(None, "Loss of training and evaluation"), ([{"step": s, "loss": 2.0} for s in (1, 2, 3)], "Loss of training")],
)
def test_the_picture_of_losses_has_a_title_and_whole_steps(tmp_path, monkeypatch, log, title):
    write_state(tmp_path, *([] if log is None else [log]))
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot.plot_losses([tmp_path], tmp_path / "p.png")
    (axes,) = figures[0].axes
    assert axes.get_title() == title
    assert all(step == int(step) for step in axes.get_xticks())


def test_a_run_without_diagnostics_is_said(tmp_path, capsys):
    write_state(tmp_path)
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path), "--output", str(tmp_path / "loss.png"), "--diagnostics", str(tmp_path / "d.png")])
    assert "no logged diagnostics" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("log", "message"), [(None, "a Trainer writes it with each checkpoint"), ([], "no logged loss")]
)
def test_nothing_to_draw_is_said(tmp_path, capsys, log, message):
    if log is not None:
        write_state(tmp_path, log)
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path), "--output", str(tmp_path / "loss.png")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "loss.png").exists()
