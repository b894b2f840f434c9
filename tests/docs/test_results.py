"""Tables and pictures of README.md and docs/ are made of benchmarks/results/ alone."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(name):
    specification = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


tables = load("tables")
draw = load("draw")
FILES = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("page", tables.PAGES)
def test_tables_are_those_of_the_results(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert tables.MARKED.search(text)
    assert tables.filled(text) == text, "make pictures"


def test_every_file_of_results_is_shown():
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in tables.PAGES)
    shown = {name for match in tables.MARKED.finditer(pages) for name in match[2].split()[1:]}
    assert {path.stem for path in FILES} <= shown | set(tables.TASKS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_run_is_hidden(path):
    """Each setting of a sweep has the sweep's seeds, and failed and diverged runs are rows too."""
    rows = [row for row in json.loads(path.read_text(encoding="utf-8")) if row["kind"] == "run"]
    seeds = {}
    for row in rows:
        seeds.setdefault((row["optimizer"], *sorted(row["arguments"].items())), set()).add(row["seed"])
        assert row["status"] in ("complete", "diverged", "failed") and row["git_commit"] and row["versions"]
    assert set.intersection(*seeds.values()) >= {1}
    counts = {}
    for optimizer, *_ in seeds:
        counts[optimizer] = counts.get(optimizer, 0) + 1
    assert len(set(counts.values())) == 1, f"unequal budgets: {counts}"


def test_the_pictures_have_what_the_tables_have(tmp_path, monkeypatch):
    figures = []
    figure = draw.Figure
    monkeypatch.setattr(draw, "Figure", lambda **settings: figures.append(figure(**settings)) or figures[-1])
    draw.draw_tokens(tmp_path / "tokens.png")
    draw.draw_rates(tmp_path / "rates.png")
    for axes, name in zip(figures[0].axes, draw.CORPORA, strict=True):
        _, comparison = tables.read(name)
        parts = {s.label: s.part_of_steps for s in comparison.summaries}
        widths = [bar.get_width() for bar in axes.patches]
        assert widths[0] == 100
        assert widths[1:] == pytest.approx([100 * parts[label] for label in list(draw.BARS)[1:]])
    assert [len(axes.lines) for axes in figures[1].axes] == [len(tables.read(n)[1].summaries) for n in draw.CORPORA]
    assert (tmp_path / "tokens.png").stat().st_size > 10_000


def test_readmes_words_are_the_pictures():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    in_words = re.search(r"!\[(.*?)\]\(docs/images/comparison.png\)", readme)[1]
    parts = [
        f"{100 * s.part_of_steps:.0f} %"
        for name in draw.CORPORA
        for label in list(draw.BARS)[1:]
        for s in tables.read(name)[1].summaries
        if s.label == label
    ]
    assert re.findall(r"\d+ %", in_words) == parts
