"""The example's YAML file cut to two steps, for a tool's own command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from launch_helpers import ROOT

BIN = Path(sys.executable).parent


def write_example(name, path, changes, without=()):
    """examples/NAME with some of its settings changed, and some left out."""
    settings = yaml.safe_load((ROOT / "examples" / name).read_text())
    path.write_text(yaml.safe_dump({k: v for k, v in {**settings, **changes}.items() if k not in without}))


def run(*command, folder, **environment):
    """What a command of this environment printed that must end well."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def assert_mars_trained(output_dir, gamma, processes=1):
    """Two steps with MARS-AdamW, of which the last saved everything."""
    (checkpoint,) = Path(output_dir).rglob("checkpoint-2")
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert {group["gamma"] for group in optimizer["param_groups"]} == {gamma}
    assert {group["kind"] for group in optimizer["param_groups"]} >= {"matrix"}
    assert optimizer["state"] and all(int(state["step"]) == 2 for state in optimizer["state"].values())
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in log if "loss" in row] == [1, 2]
    assert len(list(checkpoint.glob("rng_state*.pth"))) == processes
