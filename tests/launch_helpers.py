"""Start a script of the tests on a number of processes, or several commands at the same time."""

import contextlib
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import forks
import psutil
import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
# A script that is started has its own folder on its path; hf_mars, run_clm and what tests share lie in these.
PYTHONPATH = os.pathsep.join(map(str, (ROOT, TESTS)))

NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


def start(processes, script, *arguments, timeout=240, **environment):
    """The finished launch of a script in tests/, whatever its exit code. Raises TimeoutExpired where it hangs."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher, str(TESTS / script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def launch(processes, script, *arguments, timeout=240, **environment):
    """What a script in tests/ printed, which must end well; on processes that are forked where they can be.

    If it hangs, it is run once more, with a warning that has the stacks of its processes.
    """
    if forks.TOO_LATE.intersection(environment):
        done = start(processes, script, *arguments, timeout=timeout, **environment)
    else:
        fork = functools.partial(forks.start, processes, TESTS / script, arguments, environment, timeout)
        try:
            done = fork()
        except subprocess.TimeoutExpired as hang:
            warnings.warn(f"{script} hung and is run again:\n{hang.stderr[-20000:]}", stacklevel=2)
            done = fork()
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
    return done.stdout


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def run(commands, folder, timeout=240, meanwhile=None, **environment):
    """Run commands at the same time in `folder`.

    Args:
        commands: from a free port to (environment, command) of each. If another process takes the port before they
            do, they are run again with another one; and once where all of them hang, with a warning that has the
            stacks of their processes.
        timeout: seconds after which what still runs is terminated; 30 after one has failed.
        meanwhile: called with the running processes and their logs.

    Returns:
        The exit codes, None of what was terminated, and what each printed.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": PYTHONPATH,
        "PYTHONFAULTHANDLER": "1",  # on SIGABRT a process prints the stacks of its threads
        "HF_DATASETS_CACHE": str(folder / "cache"),
        **environment,
    }
    has_hung = False
    for _ in range(3):
        deadline = time.monotonic() + timeout
        running, logs = [], []
        try:
            for own, command in commands(free_port()):
                logs.append(folder / f"log-{len(logs)}.txt")
                with logs[-1].open("w") as file:
                    env = {**environment, **own}
                    running.append(subprocess.Popen(command, cwd=folder, env=env, stdout=file, stderr=file))
            if meanwhile is not None:
                meanwhile(running, logs)
            while None in [process.poll() for process in running] and time.monotonic() < deadline:
                if any(process.poll() for process in running):
                    deadline = min(deadline, time.monotonic() + 30)
                time.sleep(0.1)
            codes = [process.poll() for process in running]
            abort_workers(process for process, code in zip(running, codes, strict=True) if code is None)
        finally:
            for process in running:
                process.terminate()  # a launcher passes it on to its workers
            for process in running:
                process.wait(60)  # a launcher gives its workers 30 seconds
        printed = [log.read_text() for log in logs]
        hangs = not any(codes) and None in codes
        if hangs and not has_hung:
            warnings.warn(
                "\n".join(["a launch hung and is run again:", *(text[-8000:] for text in printed)]), stacklevel=2
            )
            has_hung = True
        elif not any(re.search("EADDRINUSE|another process is utilizing it", text) for text in printed):
            break
    return codes, printed


def abort_workers(launchers):
    """Make the processes that launchers have started, or they themselves where there are none, print their stacks."""
    workers = []
    for launcher in launchers:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(launcher.pid)
            workers += [child for child in parent.children() if "python" in child.name()] or [parent]
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.send_signal(signal.SIGABRT)
    psutil.wait_procs(workers, timeout=20)


def run_together(commands, folder, **options):
    """What each command printed. All must exit with 0."""
    codes, printed = run(commands, folder, **options)
    assert codes == [0] * len(codes), (codes, *(text[-4000:] for text in printed))
    return printed
