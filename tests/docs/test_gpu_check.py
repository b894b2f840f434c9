"""benchmarks/gpu_check.py, so that no minute of a GPU is lost to a typo: every part runs to its end without a GPU."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
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


@pytest.fixture
def with_broken(tmp_path):
    """gpu_check.py in which parts are replaced by code; the finished process."""

    def get(arguments, **parts):
        replaced = "\n".join(
            f"def {name}(report, seconds):\n    {code}\ngpu_check.PARTS[{name!r}] = (0.1, {name})"
            for name, code in parts.items()
        )
        script = tmp_path / "check.py"
        script.write_text(
            f"import sys\nsys.path.insert(0, {str(SCRIPT.parent)!r})\nimport torch, gpu_check\n"
            f"gpu_check.__file__ = {str(script)!r}\n{replaced}\ngpu_check.main()\n"
        )
        environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, script, "--tiny", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)

    return get


def test_a_part_that_breaks_is_a_fail_and_the_others_go_on(with_broken):
    result = with_broken(["--parts", "order", "large"], order="raise RuntimeError('no such thing')")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "FAIL order ended: RuntimeError: no such thing" in result.stdout
    assert "PASS large" in result.stdout and result.stdout.endswith("all FAILs: 1\n")


@pytest.mark.parametrize(
    ("message", "has_file"),
    [("CUDA error: an illegal memory access", False), ("Triton Error [CUDA]: misaligned", True)],
)
def test_where_the_device_is_lost_a_new_process_goes_on_and_every_line_counts(
    with_broken, tmp_path, message, has_file
):
    """Two parts lose it, and each ends a process."""
    file = tmp_path / "lines.json"
    lose = f"report.info('process', gpu_check.os.getpid()); raise RuntimeError({message!r})"
    arguments = ["--parts", "order", "host", "large", *(["--json", file] if has_file else [])]
    result = with_broken(arguments, order=lose, host=lose)
    assert result.returncode == 1, result.stdout + result.stderr
    printed = [line for line in result.stdout.splitlines() if line.startswith(("PASS", "FAIL", "INFO"))]
    assert [line.split()[1] for line in printed if line.startswith("FAIL")] == ["order", "host"]
    assert len({line.split(": ")[1] for line in printed if " process: " in line}) == 2
    assert any(line.startswith("PASS large") for line in printed) and printed[-1] == "INFO all FAILs: 2"
    if has_file:
        rows = json.loads(file.read_text())
        assert [f"{row['verdict']} {row['part']} {row['name']}: {row['detail']}" for row in rows] == printed


def test_an_interrupted_check_counts_what_it_found(with_broken):
    result = with_broken(["--parts", "order", "large"], order="raise KeyboardInterrupt")
    assert result.returncode == 130 and "Traceback" not in result.stderr
    assert result.stdout.splitlines() == ["FAIL order ended: interrupted", "INFO all FAILs: 1"]


@pytest.mark.parametrize(
    "arguments, interpreted, says",
    [
        ("", "0", "there is no CUDA or ROCm GPU that torch can use"),
        ("--tiny", "0", "set TRITON_INTERPRET=1"),
        ("", "1", "TRITON_INTERPRET=1 keeps kernels off the GPU"),
        ("--tiny --minutes 0", "1", "must be a number of at least 0.1, not '0'"),
        ("--tiny --minutes nan", "1", "must be a number of at least 0.1, not 'nan'"),
        ("--tiny --text missing.txt", "1", "--text missing.txt: cannot be read: No such file or directory"),
        ("--tiny --json missing/file", "1", "--json missing/file: cannot be written: No such file or directory"),
        ("--tiny --json README.md", "1", "--json README.md: is there already"),
    ],
)
def test_what_it_cannot_do_is_said_at_once(arguments, interpreted, says, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments.split()])
    with pytest.raises(SystemExit) as end:
        importlib.import_module("gpu_check").main()
    captured = capsys.readouterr()
    assert end.value.code == 2 and says in captured.err and not captured.out
