"""Each file in examples/ runs as it is started there, for eight steps, and ends below the loss of guessing bytes."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from model_files import write_chats, write_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
ARGUMENTS = {
    "trainer.py": ["--output_dir", "out", "--max_steps", "8", "--use_cpu", "--disable_tqdm", "true"],
    "loop.py": ["8"],
    "accelerate_loop.py": ["8"],
}
# Run by tests of their own here, and in tests/trainer/test_factories.py.
OTHERS = {"lora.py", "ms_swift_plugin.py"}


def run(*arguments, folder):
    """What an example printed that must end well."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]), "ACCELERATE_USE_CPU": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("name", ARGUMENTS)
def test_runs_and_learns(name, tmp_path):
    printed = run(EXAMPLES / name, *ARGUMENTS[name], folder=tmp_path)
    loss = re.search(r"^(\d+\.\d+) nats per byte$", printed, re.MULTILINE)
    assert loss, printed
    assert float(loss[1]) < math.log(256)


def test_lora_fine_tunes_a_model_in_a_folder(tmp_path):
    write_model(tmp_path / "model")
    tiny = ["--max_steps", "4", "--max_length", "64", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2"]
    write_chats(tmp_path / "chats.jsonl")
    printed = run(
        *(EXAMPLES / "lora.py", "model", "chats.jsonl", *tiny, "--use_cpu", "--bf16", "false", "--report_to", "none"),
        folder=tmp_path,
    )
    losses = re.search(r"evaluation loss (\d+\.\d+) before, (\d+\.\d+) after", printed)
    assert losses and float(losses[2]) < float(losses[1]), printed
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


def test_pretraining_from_yaml(tmp_path):
    short = ["--max_steps", "2", "--eval_steps", "2", "--max_eval_samples", "4", "--use_cpu", "--report_to", "none"]
    printed = run("-m", "hf_mars.clm", EXAMPLES / "pretrain.yaml", *short, folder=tmp_path)
    assert "after 2 steps" in printed and (tmp_path / "pretrained" / "model.safetensors").is_file()


@pytest.mark.exhaustive
def test_the_notebook_runs_as_it_is(tmp_path):
    """All its cells in a row, with fewer steps; its last one needs a notebook to show the picture."""
    cells = json.loads((EXAMPLES / "first_steps.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in cells)
    code = "\n".join(sources).replace("STEPS = 200", "STEPS = 4")
    (tmp_path / "cells.py").write_text(code)
    (tmp_path / "IPython").mkdir()
    (tmp_path / "IPython" / "__init__.py").write_text("version_info = (9, 0)  # matplotlib asks for it\n")
    (tmp_path / "IPython" / "display.py").write_text("def Image(path):\n    print('shows', path)\n")
    printed = run("cells.py", folder=tmp_path)
    assert "mars_m evaluation loss" in printed and printed.endswith("shows loss.png\n")
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == ARGUMENTS.keys() | OTHERS
