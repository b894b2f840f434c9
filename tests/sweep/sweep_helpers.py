"""Start sweeps of the scripts in this folder, and make rows by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PRETEND, PLAIN = HERE / "pretend_script.py", HERE / "plain_script.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HERE.parent.parent), "HF_HUB_OFFLINE": "1"}
QUICK = ["--max_extensions", "0", "--timing_steps", "0"]
GRID = ["--optim", "a", "b", "--learning_rate", "1e-4", "1e-3", "1e-2"]


def command(folder, *arguments, script=(sys.executable, str(PRETEND))):
    """Arguments before and after `--`; the script's are the ones after "--"."""
    own, of_script = list(map(str, arguments)), []
    if "--" in own:
        own, of_script = own[: own.index("--")], own[own.index("--") + 1 :]
    start = [sys.executable, "-m", "hf_mars.sweep", "--output_dir", str(folder), *own]
    return [*start, "--", *script, *of_script] if script else start


def sweep(folder, *arguments, code=0, timeout=240, env=None, **options):
    """A finished sweep, which must exit with `code`."""
    done = subprocess.run(
        command(folder, *arguments, **options),
        env={**ENVIRONMENT, **(env or {})},
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


def rows_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def row(optimizer, learning_rate, seed, final_loss, *, kind="run", status="complete", curve=(), **others):
    """A row of results.jsonl; `curve` is (step, evaluation loss, …)."""
    evaluation = [[step, loss, step / 10, None] for step, loss in curve]
    made = {
        "kind": kind,
        "optimizer": optimizer,
        "arguments": {"optim": optimizer, "learning_rate": repr(learning_rate)},
        "seed": seed,
        "status": status,
        "problem": None,
        "stderr": [],
        "final_loss": final_loss,
        "loss_of": "evaluation",
        "steps": 100,
        "max_steps": 100,
        "seconds": 10.0,
        "seconds_per_step": 0.1,
        "state_bytes": 800,
        "parameters": 100,
        "initial": float(seed),
        "versions": {"torch": "2"},
        "hardware": {"cpu": "x"},
        "git_commit": None,
        "training": [[step, 9 - step / 20, step / 10, None] for step in range(10, 101, 10)],
        "evaluation": evaluation,
        "wall_seconds": 12.0,
        "jobs": 1,
        "folder": f"runs/{optimizer}-{learning_rate}-{seed}",
        "command": ["python", "train.py"],
    }
    return made | others
