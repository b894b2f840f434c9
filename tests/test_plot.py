"""Loss curves from trainer_state.json."""

import json

import pytest

from hf_mars import plot

LOG = [
    {"step": 1, "loss": 5.0},
    {"step": 2, "loss": 4.0},
    {"step": 2, "eval_loss": 4.5},
    {"step": 2, "train_loss": 4.4},
]


def write_state(folder, log=LOG):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))


def test_history_of_a_finished_run(tmp_path):
    write_state(tmp_path)
    assert plot.loss_history(tmp_path) == {"loss": [(1, 5.0), (2, 4.0)], "eval_loss": [(2, 4.5)]}


def test_history_of_a_running_one_is_its_last_checkpoints(tmp_path):
    for step in (5, 10):
        write_state(tmp_path / f"checkpoint-{step}", [{"step": step, "loss": float(step)}])
    assert plot.loss_history(tmp_path)["loss"] == [(10, 10.0)]


def test_several_runs_make_one_picture(tmp_path, capsys):
    for name in ("a", "b"):
        write_state(tmp_path / name)
    plot.main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "loss.png")])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


MARS_LOG = [
    {"step": 1, "loss": 5.0, "mars/correction_ratio": 0.0, "mars/clipped_fraction": 0.5, "mars/lr_matrix": 0.2},
    {"step": 2, "loss": 4.0, "mars/correction_ratio": 0.7, "mars/gradient_cosine": 0.1, "mars/lr_matrix": 0.1},
]


def test_diagnostics_make_another_picture(tmp_path, capsys):
    write_state(tmp_path / "a", MARS_LOG)
    write_state(tmp_path / "b", MARS_LOG[:1])
    pictures = [str(tmp_path / name) for name in ("loss.png", "diagnostics.png")]
    plot.main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", pictures[0], "--diagnostics", pictures[1]])
    assert capsys.readouterr().out == "".join(f"wrote {picture}\n" for picture in pictures)
    assert (tmp_path / "diagnostics.png").read_bytes().startswith(b"\x89PNG")


def test_every_diagnostic_is_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda axes, x, y, *rest, **more: drawn.append((x, y)))
    write_state(tmp_path, MARS_LOG)
    plot.plot_diagnostics([tmp_path], tmp_path / "diagnostics.svg")
    assert drawn == [((1, 2), (0.0, 0.7)), ((2,), (0.1,)), ((1,), (0.5,)), ((1, 2), (0.2, 0.1))]


def test_a_run_without_diagnostics_is_said(tmp_path, capsys):
    write_state(tmp_path)
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path), "--output", str(tmp_path / "loss.png"), "--diagnostics", str(tmp_path / "d.png")])
    assert "no logged diagnostics" in capsys.readouterr().err


@pytest.mark.parametrize(("log", "message"), [(None, "trainer_state.json"), ([], "no logged loss")])
def test_nothing_to_draw_is_said(tmp_path, capsys, log, message):
    if log is not None:
        write_state(tmp_path, log)
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path), "--output", str(tmp_path / "loss.png")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "loss.png").exists()
