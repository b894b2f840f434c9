"""Reports are made of stored rows alone."""

import json
import subprocess
import sys

import pytest
from matplotlib.figure import Figure
from sweep_helpers import ENVIRONMENT, row, sweep

from hf_mars.sweep.errors import SweepError
from hf_mars.sweep.plan_file import make_plan
from hf_mars.sweep.report import report

CURVE = [(20, 5.0), (40, 4.0), (60, 3.0), (80, 2.5), (100, 2.0)]


def write(folder, rows):
    (folder / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))


@pytest.fixture
def rows():
    rows = []
    for seed in (1, 2):
        for rate in (1e-3, 1e-2):
            rows.append(row("a", rate, seed, 2.0 + rate, curve=[(s, loss + rate) for s, loss in CURVE]))
            rows.append(row("b", rate, seed, 1.5 + rate + seed / 10, curve=[(s, loss - 0.5) for s, loss in CURVE]))
    return rows


def test_table_and_verdicts(tmp_path, rows):
    write(tmp_path, rows)
    lines = report(tmp_path).splitlines()
    assert lines[2] == (
        "| a | learning rate 0.001 (lower edge) | 2.0010 | baseline | 100 | 10.0 | 0.1 | 800 bytes, 8.0 per parameter "
        "| 4 (0, 0) |"
    )
    assert lines[3].startswith(
        "| b | learning rate 0.001 (lower edge) | 1.6510 | -0.3500 ± 0.0500 | 80 (80 %) | 8.0 ("
    )
    assert lines[5].startswith("- a is the baseline: 2.0010 at learning rate 0.001; its best learning rate is the low")
    assert lines[6].startswith("- b reaches a's best loss after 80 % of the steps and 80 % of the time; it ends 0.35")
    text = (tmp_path / "report.md").read_text()
    assert "The final loss is that of the last evaluation." in text and text.count("![") == 3
    assert "| b | learning rate 0.01 | 1.6100, 1.7100 | 1.6600 |" in text
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["optimizers"][1]["part_of_steps"] == pytest.approx(0.7996, abs=1e-4)


def test_a_first_point_below_is_a_bound(tmp_path, rows):
    """Where the curve's first evaluation is below already, nobody knows where it came there."""
    early = [each for each in rows if each["optimizer"] == "a"]
    early += [row("b", 0.001, seed, 1.5, curve=[(s, 1.5) for s in (25, 50, 75, 100)]) for seed in (1, 2)]
    write(tmp_path, early)
    short = report(tmp_path)
    assert "| ≤ 25 (25 %) | ≤ 2.5 (25 %) |" in short and "b reaches a's best loss after at most 25 % of" in short


@pytest.mark.parametrize(("second", "says"), [(0.105, "differ by up to 5 %."), (0.15, "of that size mean nothing")])
def test_how_far_timings_of_one_setting_differ_is_said(tmp_path, rows, second, says):
    timing = [
        row(label, 0.001, 1, 2.0, kind="timing", seconds_per_step=seconds)
        for label in "ab"
        for seconds in (0.1, second)
    ]
    write(tmp_path, [*rows, *timing])
    report(tmp_path)
    assert says in (tmp_path / "report.md").read_text()


def test_seeds_that_chose_and_further_ones_are_said(tmp_path, rows):
    write(tmp_path, rows)
    make_plan(["python", "x.py"], ["a", "b"], [0.001], seeds=1, final_seeds=3).save(tmp_path)
    report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "every setting with seed 1, which chose the best ones; these with seeds 1 to 3." in text


def test_pictures_have_titles_rates_the_baseline_s_end_and_crosses_for_lost_runs(tmp_path, rows, monkeypatch):
    figures = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.update({path.name: figure}))
    write(tmp_path, [*rows, row("b", 0.1, 1, None, status="diverged")])
    report(tmp_path)
    legends = {name: [t.get_text() for t in f.axes[0].get_legend().get_texts()] for name, f in figures.items()}
    assert legends["loss.png"] == legends["seconds.png"] == ["a, 0.001", "b, 0.001", "where a ends"]
    assert legends["learning_rate.png"] == ["a", "b", "b: no loss"]
    assert [figures[name].axes[0].get_title() for name in ("loss.png", "learning_rate.png")] == [
        "Loss against step",
        "Final loss against learning rate",
    ]
    (cross,) = [line for line in figures["learning_rate.png"].axes[0].lines if line.get_marker() == "x"]
    assert list(cross.get_xdata()) == [0.1]


def test_seconds_are_not_told_of_runs_that_shared_the_machine(tmp_path, rows):
    write(tmp_path, [each | {"jobs": 2} for each in rows])
    assert "not timed" in report(tmp_path)
    assert "there are no seconds" in (tmp_path / "report.md").read_text() and not (tmp_path / "seconds.png").exists()


def test_tokens_where_the_script_counts_them(tmp_path, rows):
    for each in rows:
        for kind in ("training", "evaluation"):
            each[kind] = [[step, loss, seconds, 1000 * step] for step, loss, seconds, _ in each[kind]]
    write(tmp_path, rows)
    short = report(tmp_path)
    assert "tokens to baseline's loss" in short and "after 80 % of the tokens" in short and "79,960 (80 %)" in short


def test_unequal_numbers_of_settings_and_short_schedules_are_said(tmp_path, rows):
    write(tmp_path, [*rows, row("b", 0.1, 1, 3.0, steps=50)])
    report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "unequal numbers of settings: a 2, b 3" in text and "1 runs stopped before their schedule's end" in text


def test_what_makes_runs_less_comparable_is_said(tmp_path, rows):
    write(tmp_path, rows)
    report(tmp_path)
    assert "**" not in (tmp_path / "report.md").read_text()
    write(tmp_path, [*rows, row("b", 0.1, 1, 3.0, initial=7.0, versions={"torch": "3"})])
    report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "**Runs of the same seed began from different weights**" in text and "differ in versions" in text
    assert "differ in hardware" not in text


def test_the_report_needs_nothing_but_the_rows(tmp_path, rows):
    """Not the runs' folders, nor a plan, nor torch or transformers."""
    write(tmp_path, rows)
    program = "import sys; from hf_mars.sweep.__main__ import main; main(sys.argv[1:]); "
    program += "sys.exit(sorted({'torch', 'transformers', 'optuna'} & set(sys.modules)) or 0)"
    done = subprocess.run(
        [sys.executable, "-c", program, "--report", "--output_dir", str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == sweep(tmp_path, "--report", script=()).stdout


def test_no_sweep(tmp_path):
    with pytest.raises(SweepError, match=r"holds no sweep: it has no results.jsonl"):
        report(tmp_path)
    write(tmp_path, [])
    assert report(tmp_path) == "no run has ended yet"
