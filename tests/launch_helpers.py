"""Start a script of this folder on a number of processes, or several commands at the same time."""

import os
import socket
import subprocess
import sys
import time
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


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def run_together(commands, folder, timeout=100, **environment):
    """Run commands at the same time in `folder`; what each printed. All must exit with 0, none may hang."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "HF_DATASETS_CACHE": str(folder / "cache"),
        **environment,
    }
    deadline = time.monotonic() + timeout
    logs = [folder / f"log-{i}.txt" for i in range(len(commands))]
    running = []
    try:
        for command, log in zip(commands, logs, strict=True):
            env = {**environment, **command[0]}
            with log.open("w") as file:
                running.append(subprocess.Popen(command[1], cwd=folder, env=env, stdout=file, stderr=file))
        codes = [process.wait(max(deadline - time.monotonic(), 1)) for process in running]
    finally:
        for process in running:
            process.terminate()  # a launcher passes it on to its workers
        for process in running:
            process.wait(30)
    printed = [log.read_text() for log in logs]
    assert codes == [0] * len(commands), "\n".join(printed)[-6000:]
    return printed
