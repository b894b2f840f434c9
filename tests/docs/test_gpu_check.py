"""benchmarks/gpu_check.py, so that no minute of a GPU is lost to a typo: every part runs to its end without a GPU."""

import json
import os
import subprocess
import sys

import pytest
from launch_helpers import ROOT

pytest.importorskip("triton")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # on a machine in full use

SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


def gpu_check(*arguments, **environment):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_every_part_runs_to_its_end(tmp_path):
    """The last one, training, in test_pretrain_gpu.py: it is that script, as another process."""
    parts = "versions tests order large speed host matrices engines trainer training".split()
    file = tmp_path / "report.json"
    result = gpu_check("--tiny", "--json", file, "--parts", *parts, "--minutes", "20", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(file.read_text())
    assert [row["part"] for row in rows if row["name"] == "took"] == parts
    passed = {part: sum(row["verdict"] == "PASS" for row in rows if row["part"] == part) for part in parts}
    assert passed == dict(zip(parts, [2, 1, 9, 1, 0, 0, 1, 2, 0, 1], strict=True))
    printed = [line for line in result.stdout.splitlines() if line.startswith(("PASS", "FAIL", "INFO"))]
    assert len(printed) == len(rows)


def test_a_part_that_breaks_is_a_fail_and_the_others_go_on(tmp_path):
    script = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu_check, gpu_check_steps
def broken(report, seconds):
    raise RuntimeError("no such thing")
gpu_check.PARTS["order"] = 1.0, broken
sys.argv = ["gpu_check.py", "--tiny", "--parts", "order", "large"]
gpu_check.main()
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "FAIL order ended: RuntimeError: no such thing" in result.stdout
    assert "PASS large" in result.stdout


@pytest.mark.parametrize(
    "arguments, says", [([], "there is no GPU that torch can use"), (["--tiny"], "set TRITON_INTERPRET=1")], ids=str
)
def test_what_it_cannot_do_is_said(arguments, says):
    result = gpu_check(*arguments, TRITON_INTERPRET="0")
    assert result.returncode == 2 and says in result.stderr
