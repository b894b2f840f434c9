"""benchmarks/pretrain_gpu.py without a GPU: a tiny model, and the laws of the comparison."""

import argparse
import json
import subprocess
import sys

import numpy as np
import pretrain_gpu
import pretrain_gpu_runs
import pytest
from launch_helpers import ROOT
from test_benchmarks import rows_of

from hf_mars.sweep.errors import SweepError
from hf_mars.sweep.plan_file import make_plan

pytestmark = pytest.mark.slow


def run(monkeypatch, folder, *arguments):
    """The script in this process; the rows of results.jsonl."""
    words = ["pretrain_gpu.py", "--tiny", "--minutes", "2", "--output_dir", str(folder), *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", words)
    pretrain_gpu.main()
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_comparison(monkeypatch, tmp_path, capsys):
    seen = []  # by each run: the blocks that it trains on and evaluates
    get, make = pretrain_gpu_runs.Blocks.__getitem__, pretrain_gpu.make
    monkeypatch.setattr(pretrain_gpu_runs.Blocks, "__getitem__", lambda self, i: seen[-1].append(i) or get(self, i))
    monkeypatch.setattr(pretrain_gpu, "make", lambda *args: seen.append([]) or make(*args))
    rows = run(monkeypatch, tmp_path / "out", "--max_steps", "25", "--learning_rate", "3e-3")
    assert [row["arguments"]["optim"] for row in rows] == ["adamw_torch_fused", "mars_adamw", "mars_m"]
    assert [row["status"] for row in rows] == ["complete"] * 3
    # The same tokens in the same order, from the same weights, to the end of the schedule.
    assert len(seen) == 6 and seen[3] == seen[4] == seen[5] and len(set(seen[3])) > 100
    assert len({row["initial"] for row in rows}) == 1 and [row["steps"] for row in rows] == [20] * 3
    for row in rows:
        assert [p[0] for p in row["evaluation"]] == list(range(2, 21, 2)) and row["evaluation"][-1][3] == 20 * 256
        assert row["evaluation"][-1][1] < row["evaluation"][0][1] < np.log(320) + 0.2
        assert row["tokens_per_second"] == pytest.approx(256 / row["seconds_per_step"], rel=1e-3)
        assert row["state_bytes"] > 0 and row["peak_memory_bytes"] is None
        assert row["versions"]["hf_mars"] and row["hardware"]["device"] == "cpu"
        assert row["command"][:2] == ["python", "benchmarks/pretrain_gpu.py"] and "--max_steps" in row["command"]
    output = capsys.readouterr().out
    printed = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [p["eval_loss"] for p in printed if "eval_loss" in p][:10] == pytest.approx(
        [p[1] for p in rows[0]["evaluation"]], abs=1e-5
    )
    assert len([p for p in printed if "final_loss" in p]) == 3 and rows_of(output) == 3
    assert (tmp_path / "out" / "loss.png").is_file() and "tokens" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(SystemExit, match=r"has a results\.jsonl already"):
        run(monkeypatch, tmp_path / "out")


def test_a_run_that_fails_is_counted(monkeypatch, tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    plan.write_text("learning_rate: 1e-3\noptimizers: [adamw_torch, {optim: mars_adamw, optim_args: gamma=-1}]\n")
    rows = run(monkeypatch, tmp_path / "out", "--max_steps", "10", "--plan", plan)
    assert [row["status"] for row in rows] == ["complete", "failed"] and "gamma" in rows[1]["problem"]
    assert "mars_adamw has no setting that came through" in capsys.readouterr().out
    assert "gamma" in (tmp_path / "out" / "report.md").read_text().split("## Failed runs")[1]


def budget(monkeypatch, minutes, most=None):
    """The steps of two optimizers that take 0.2 and 0.3 seconds for one, at two rates, and 5 + 9 × 0.5 other seconds
    in a run."""
    plan = make_plan(["python"], ["a", "b"], [1e-3, 2e-3], seeds=1, final_seeds=None)

    def made(run, *_):
        seconds = {"a": 0.2, "b": 0.3}[run.setting.label]
        return {
            "status": "complete",
            "seconds_per_step": seconds,
            "wall_seconds": 15 * seconds + 5,
            "seconds": 15 * seconds,
            "evaluation_seconds": 0.5,
        }

    monkeypatch.setattr(pretrain_gpu, "make", made)
    monkeypatch.setattr(pretrain_gpu.time, "monotonic", lambda: 130.0)
    arguments = argparse.Namespace(minutes=minutes, max_steps=most)
    return pretrain_gpu.steps_for(plan, None, 15, arguments, began=100.0)


def test_the_minutes_are_shared_out(monkeypatch):
    steps = budget(monkeypatch, 10)
    needed = 4 * (5 + 9 * 0.5) + steps * 2 * (0.2 + 0.3)
    assert steps == 510 and needed <= (600 - 30) * 0.97 < needed + 10
    assert budget(monkeypatch, 10, most=95) == 90
    with pytest.raises(SweepError, match=r"--minutes 1 are too few: 10 steps of each of the 4 runs take about 1\.3"):
        budget(monkeypatch, 1)
    assert budget(monkeypatch, 1.4) == 10


def test_the_novel_suffices_for_gpt2_small():
    task = pretrain_gpu.prepare(pretrain_gpu.NOVEL, pretrain_gpu.SMALL, True, ["python"])
    assert len(task.train) % task.update == 0 < len(task.held_out) and task.tokens_per_step == 131_072


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("none.txt", None, r"--text .*none\.txt cannot be read"),
        ("short.txt", b"It is a truth\n" * 20, r"short\.txt is too short: .* at least 256 and 32 are needed"),
        ("odd.bin", b"123", r"odd\.bin cannot be read"),
        ("other.bin", np.full(9000, 300, dtype=np.uint16).tobytes(), "has token 300 and --vocab_size is 300"),
    ],
)
def test_a_text_that_cannot_serve(name, content, words, monkeypatch, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=words):
        run(monkeypatch, tmp_path / "out", "--text", tmp_path / name)
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_a_checkout_without_the_other_packages_and_without_a_gpu(tmp_path):
    script = ROOT / "benchmarks" / "pretrain_gpu.py"
    blocked = "import runpy, sys; sys.modules |= dict.fromkeys(('datasets', 'evaluate', 'optuna'))"
    code = f"{blocked}; sys.path[0] = {str(script.parent)!r}; runpy.run_path({str(script)!r}, run_name='__main__')"
    command = [sys.executable, "-c", code, "--minutes", "1"]
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    expected = "pretrain_gpu.py: there is no GPU that torch can use; with --tiny a tiny model is trained on the CPU"
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (1, expected), done.stderr
    assert "Traceback" not in done.stderr
