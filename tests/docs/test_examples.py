"""Each file in examples/ runs as it is started there, for eight steps, and ends below the loss of guessing bytes."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = {
    "trainer.py": ["--output_dir", "out", "--max_steps", "8", "--use_cpu", "--disable_tqdm", "true"],
    "loop.py": ["8"],
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_runs_and_learns(name, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *ARGUMENTS[name]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    loss = re.search(r"^(\d+\.\d+) nats per byte$", done.stdout, re.MULTILINE)
    assert loss, done.stdout
    assert float(loss[1]) < math.log(256)


def test_every_example_is_run():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == ARGUMENTS.keys()
