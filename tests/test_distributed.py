"""Two processes give the numbers of one: each rank sees half of every batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close

TESTS = Path(__file__).parent


def launch(processes, script, *arguments):
    """Run a script of this folder on a number of processes; what it printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(TESTS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("engine", ["ddp", "ddp_bucket_view", "fsdp2"])
def test_two_processes_equal_one(engine):
    """float64, 12 steps, clipping active on some of them. Sums over shards are ordered otherwise than on one process;
    Newton-Schulz multiplies such a rounding by up to 500, sign() is a matter of luck only within 1e-16 of zero."""
    errors = json.loads(launch(2, "distributed_worker.py", engine).strip().splitlines()[-1])
    assert len(errors) == 12
    assert max(errors.values()) < 1e-10, errors


def test_two_processes_equal_one_in_the_trainer(tmp_path):
    """DDP with gradient accumulation (no_sync) and unequal numbers of labels, approximate and exact; float32."""
    for processes in (1, 2):
        launch(processes, "trainer_worker.py", tmp_path, processes)
    one, two = (torch.load(tmp_path / f"weights-{processes}.pt") for processes in (1, 2))
    for expected, actual in zip(one, two, strict=True):
        assert_close(actual, expected, 1e-4)
    assert not torch.equal(one[0][0], one[1][0])  # exact mode did make a difference
