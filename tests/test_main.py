"""python -m hf_mars: any script, unchanged."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from transformers import HfArgumentParser, TrainingArguments
import neighbour
if __name__ == "__main__":
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    print(args.optim.value, sys.argv[0], neighbour.value)
    sys.exit(3 if args.optim.value == "mars_m" else 0)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "neighbour.py").write_text("value = 7")
    return tmp_path


def run(folder, *arguments):
    command = [sys.executable, "-m", "hf_mars", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("how", [["train.py"], ["-m", "train"]], ids=["script", "module"])
def test_names_argv_and_imports(folder, how):
    done = run(folder, *how, "--output_dir", "out", "--optim", "mars_lion")
    name, script, value = done.stdout.split()
    assert (name, value) == ("mars_lion", "7") and script.endswith("train.py"), done.stderr


def test_exit_code(folder):
    assert run(folder, "train.py", "--output_dir", "out", "--optim", "mars_m").returncode == 3


@pytest.mark.parametrize("arguments, code", [([], 2), (["--help"], 0), (["missing.py"], 1)], ids=str)
def test_without_a_script(folder, arguments, code):
    done = run(folder, *arguments)
    assert done.returncode == code
    assert "python -m hf_mars" in done.stdout + done.stderr
