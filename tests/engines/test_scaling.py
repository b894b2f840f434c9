"""The formulas of docs/scaling.md against counted bytes, on 2 and 4 processes, and its tables against the formulas."""

import importlib.util
import json

import pytest
import torch
from launch_helpers import ROOT, launch
from torch.utils.flop_counter import FlopCounterMode

from hf_mars.optim.algorithm.newton_schulz import newton_schulz

SCRIPT = ROOT / "benchmarks" / "communication.py"
specification = importlib.util.spec_from_file_location("communication", SCRIPT)
communication = importlib.util.module_from_spec(specification)
specification.loader.exec_module(communication)


HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.exhaustive)])
def counted(request):
    """(ranks, rows that the script counted on so many processes)."""
    engines = [engine for engine in communication.ENGINES if HAS_DEEPSPEED or not engine.startswith("zero")]
    printed = launch(request.param, SCRIPT, "--count", *engines, DS_ACCELERATOR="cpu")
    return request.param, json.loads(printed.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("engine", communication.ENGINES)
def test_counted_bytes_are_those_of_the_formulas(counted, engine):
    """Every variant that the engine runs was counted: state, weights, gradients, and collectives by kind."""
    if engine.startswith("zero") and not HAS_DEEPSPEED:
        pytest.skip("DeepSpeed is not installed")
    ranks, rows = counted
    expected = [
        {"engine": engine, "variant": name, "ranks": ranks, **communication.formulas(engine, name, ranks)}
        for name, variant in communication.VARIANTS.items()
        if engine in variant.engines
    ]
    assert len(expected) >= 3
    assert [row for row in rows if row["engine"] == engine] == expected


def test_operations_of_newton_schulz():
    for shape in ((6, 10), (10, 6), (7, 7), (6, 12), (4, 12), (12, 4)):
        with FlopCounterMode(display=False) as counter:
            newton_schulz(torch.randn(shape))
        assert counter.get_total_flops() == communication.newton_schulz_flops(torch.Size(shape))


def test_shares_of_the_matrices():
    """Two ranks: the large matrix alone, the two small ones together; never less than the largest matrix."""
    shapes = [torch.Size(shape) for shape in ((4, 4), (4, 8), (4, 4))]
    model = communication.Model({"matrix": shapes, "embedding": [], "1d": []})
    large, small = communication.newton_schulz_flops(shapes[1]), communication.newton_schulz_flops(shapes[0])
    assert model.largest_share(1) == (64, large + 2 * small)
    assert model.largest_share(2) == (32, max(large, 2 * small))
    assert model.largest_share(8) == (32, large)


def test_sent_bytes():
    """Of 100 bytes on 4 ranks in a ring, all-gather and reduce-scatter send three quarters, all-reduce twice that."""
    sent = {name: communication.sent_bytes({name: 100}, 4) for name in ("all_gather", "reduce_scatter", "all_reduce")}
    assert sent == {"all_gather": 75, "reduce_scatter": 75, "all_reduce": 150}


def test_the_tables_in_the_documentation_are_those_of_the_formulas(tmp_path):
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    copy = tmp_path / "scaling.md"
    copy.write_text(text, encoding="utf-8")
    communication.write(copy)
    assert copy.read_text(encoding="utf-8") == text
