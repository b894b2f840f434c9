"""Start a script of the tests on a number of processes that are forked from one which has imported the libraries.

A launch that starts Python anew spends most of its time on imports. This has the environment of torchrun's processes;
what a launcher does itself is tested with real ones (launch_helpers.py).
"""

import contextlib
import faulthandler
import functools
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from unittest import mock

import psutil
import torch
import torch.distributed as dist

IMPORTED = ["accelerate", "peft", "transformers.trainer", "hf_mars.trainer"]
# They are read at the import of what has been imported.
TOO_LATE = {"TRITON_INTERPRET"}


@functools.cache
def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        multiprocessing.forkserver.ensure_running()
    return context


def start(processes, script, arguments, environment, timeout):
    """The finished launch of a script, whatever its exit code: 0, or that of the first process that failed.

    Raises:
        TimeoutExpired: it did not end in `timeout` seconds; its stderr ends with the stacks of the processes, and
            their states.
        ValueError: the environment has variables that come too late.
    """
    if late := TOO_LATE.intersection(environment):
        raise ValueError(f"{sorted(late)} would come too late for processes that are forked")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    everywhere = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is ours
    }
    argv = [str(script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        running = []
        for rank in range(processes):
            own = {**os.environ, **everywhere, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment}
            running.append(_server().Process(target=_run, args=(argv, own, outputs)))
            running[-1].start()
        codes, states = _wait(running, timeout)
        stdout, stderr = (output.read_text() if output.exists() else "" for output in outputs)
    if codes is None:
        raise TimeoutExpired(argv, timeout, stdout, f"{stderr}\n{states}")
    return CompletedProcess(argv, next(filter(None, codes), 0), stdout, stderr)


def _wait(running, timeout):
    """The exit codes, None where they did not come in time, and what state the processes were in then.

    What runs then, or after one has failed, is killed.
    """
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.exitcode for process in running]
        if None not in codes or any(codes):
            break
        left = [process.sentinel for process in running if process.exitcode is None]
        if not multiprocessing.connection.wait(left, max(0, deadline - time.monotonic())):
            codes = None
            break
    states = {process.pid: process.exitcode for process in running}
    if codes is None:
        for process in running:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                states[process.pid] = psutil.Process(process.pid).status()
                os.kill(process.pid, signal.SIGABRT)
                process.join(5)
    for process in running:
        process.kill()
        process.join()
    return codes, states


def _run(argv, environment, outputs):
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    faulthandler.enable(2)  # on SIGABRT a process prints the stacks of its threads
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))  # before this process's, which it has
    runpy.run_path(argv[0], run_name="__main__")
