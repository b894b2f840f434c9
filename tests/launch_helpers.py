"""Start a script of this folder on a number of processes."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def start(processes, script, *arguments, timeout=240, **environment):
    """The finished launch, whatever its exit code. Raises TimeoutExpired where it hangs."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher, str(TESTS / script), *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=timeout)


def launch(processes, script, *arguments, **options):
    """What a launch printed that must end well."""
    done = start(processes, script, *arguments, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout
