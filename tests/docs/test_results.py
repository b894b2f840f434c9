"""Figures in README.md and docs/ are those of benchmarks/results/, and the pictures are drawn from there."""

import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMPARISON = json.loads((ROOT / "benchmarks" / "results" / "comparison.json").read_text(encoding="utf-8"))

specification = importlib.util.spec_from_file_location("draw", ROOT / "tools" / "draw.py")
draw = importlib.util.module_from_spec(specification)
specification.loader.exec_module(draw)


def test_the_comparison_has_the_measured_rows():
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| \w+ \| 0\.\d+ \| .*$", page, re.MULTILINE)
    seeds = len(COMPARISON["seeds"])
    assert len(table) == len(COMPARISON["rows"])
    for line, row in zip(table, COMPARISON["rows"], strict=True):
        low, high = row["eval_loss_of_seeds"]
        loss = f"{row['eval_loss']:.3f} ({low:.3f} to {high:.3f})"
        assert line == f"| {row['row']} | {row['learning_rate']:g} | {seeds} | {loss} | {row['eval_perplexity']:.1f} |"


def test_readme_has_the_best_measured_rows():
    cells = r"^\| `(\w+)` \| \(([\d.]+), ([\d.]+)\).*? \| ([\de.-]+) \| ([\d.]+) \| ([\d.]+) \|$"
    best = draw.best_rows(COMPARISON)
    assert [(name, *map(float, numbers)) for name, *numbers in re.findall(cells, README, re.MULTILINE)] == [
        (row["optim"], *row["betas"], row["learning_rate"], row["eval_loss"], row["eval_perplexity"]) for row in best
    ]
    in_words = re.search(r"a bar per optimizer: (.*?)\]\(docs/images/comparison.png\)", README)[1]
    assert re.findall(r"\d+\.\d", in_words) == [f"{row['eval_perplexity']:.1f}" for row in best]


def test_the_picture_has_a_bar_for_each_of_them(tmp_path, monkeypatch):
    figures = []
    figure = draw.Figure
    monkeypatch.setattr(draw, "Figure", lambda **settings: figures.append(figure(**settings)) or figures[-1])
    draw.draw_comparison(tmp_path / "comparison.png")
    (axes,) = figures[0].axes
    assert [bar.get_width() for bar in axes.patches] == [r["eval_perplexity"] for r in draw.best_rows(COMPARISON)]
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
