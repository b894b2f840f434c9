"""Two processes give the numbers of one: each rank sees half of every batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "distributed_worker.py"


@pytest.mark.parametrize("engine", ["ddp", "ddp_bucket_view", "fsdp2"])
def test_two_processes_equal_one(engine):
    """float64, 12 steps, clipping active on some of them. Sums over shards are ordered otherwise than on one process;
    Newton-Schulz multiplies such a rounding by up to 500, sign() is a matter of luck only within 1e-16 of zero."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, str(WORKER), engine], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    errors = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(errors) == 12
    assert max(errors.values()) < 1e-10, errors
