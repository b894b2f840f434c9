"""benchmarks/gpu_check.py, so that no minute of a GPU is lost to a typo: every part runs to its end without a GPU."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

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
def check(monkeypatch):
    """The module, which takes arguments and looks for a GPU as on a machine without one."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return importlib.import_module("gpu_check")


def run_parts(check, monkeypatch, *arguments, **parts):
    """The exit status of a check whose parts are these functions."""
    for name, function in parts.items():
        monkeypatch.setitem(check.PARTS, name, (0.1, function))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--tiny", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        check.main()
    return end.value.code


def right(report, seconds):
    report.check("it", True, "is right")


def failing(error):
    def part(report, seconds):
        raise error

    return part


def test_a_part_that_breaks_is_a_fail_and_the_others_go_on(check, monkeypatch, capsys):
    order = failing(RuntimeError("no such thing"))
    assert run_parts(check, monkeypatch, "--parts", "order", "large", order=order, large=right) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if " took: " not in line]
    assert lines == [
        "FAIL order ended: RuntimeError: no such thing",
        "PASS large it: is right",
        "INFO all FAILs: 1",
    ]


def test_an_interrupted_check_counts_what_it_found(check, monkeypatch, capsys):
    assert run_parts(check, monkeypatch, "--parts", "order", "large", order=failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().out.splitlines() == ["FAIL order ended: interrupted", "INFO all FAILs: 1"]


def test_what_loses_the_device(check):
    for message in ("CUDA error: an illegal memory access", "Triton Error [CUDA]: misaligned", "HIP error: bad"):
        assert check.LOST_DEVICE.search(message)
    assert not check.LOST_DEVICE.search("CUDA out of memory. Tried to allocate 28 GiB")


def test_where_the_device_is_lost_the_rest_is_another_process_s(check, monkeypatch, capsys, tmp_path):
    """Which gets the lines so far and the parts that are left; its exit status counts."""
    started = []

    def start(command):
        *_, minutes, _, lines, _, first, second = command
        started.append((json.loads(Path(lines).read_text()), [first, second], float(minutes)))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(check.subprocess, "run", start)
    order = failing(RuntimeError("CUDA error: lost"))
    arguments = ["--minutes", "5", "--parts", "large", "order", "host", "speed"]
    assert run_parts(check, monkeypatch, *arguments, large=right, order=order) == 1
    ((rows, parts, minutes),) = started
    assert [row["verdict"] for row in rows if row["name"] != "took"] == ["PASS", "FAIL"]
    assert parts == ["host", "speed"] and minutes <= 5 and "all FAILs" not in capsys.readouterr().out


@pytest.mark.exhaustive
@pytest.mark.parametrize("has_file", [False, True])
def test_where_the_device_is_lost_a_new_process_goes_on_and_every_line_counts(tmp_path, has_file):
    """Two parts lose it, and each ends a process."""
    script = tmp_path / "check.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu_check
def lost(report, seconds):
    report.info("process", gpu_check.os.getpid())
    raise RuntimeError("Triton Error [CUDA]: misaligned")
gpu_check.__file__ = {str(script)!r}
gpu_check.PARTS |= dict(order=(0.1, lost), host=(0.1, lost))
gpu_check.main()
""")
    file = tmp_path / "lines.json"
    command = [sys.executable, script, "--tiny", "--parts", "order", "host", "large"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*command, *(["--json", file] if has_file else [])], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert result.returncode == 1, result.stdout + result.stderr
    printed = [line for line in result.stdout.splitlines() if line.startswith(("PASS", "FAIL", "INFO"))]
    assert [line.split()[1] for line in printed if line.startswith("FAIL")] == ["order", "host"]
    assert len({line.split(": ")[1] for line in printed if " process: " in line}) == 2
    assert any(line.startswith("PASS large") for line in printed) and printed[-1] == "INFO all FAILs: 2"
    if has_file:
        rows = json.loads(file.read_text())
        assert [f"{row['verdict']} {row['part']} {row['name']}: {row['detail']}" for row in rows] == printed


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
def test_what_it_cannot_do_is_said_at_once(arguments, interpreted, says, check, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments.split()])
    with pytest.raises(SystemExit) as end:
        check.main()
    captured = capsys.readouterr()
    assert end.value.code == 2 and says in captured.err and not captured.out
