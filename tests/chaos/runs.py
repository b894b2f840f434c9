"""Runs in processes of their own, which are started by forking: the libraries are imported once."""

import hashlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from launch_helpers import free_port
from tqdm import tqdm
from trainer_helpers import make_trainer
from transformers.utils import logging

from hf_mars.trainer import checkpoint_saving, checkpoints
from hf_mars.trainer.checkpoints import CheckpointError
from hf_mars.trainer.signals import TrainingStopped

STEPS = 12
LOST = 71  # the exit code of a process whose peer is gone
# Functions at whose n-th call a run signals itself: the parts of a save, in their order, and a step.
SAVING = {
    "begin": (checkpoints, "begin"),
    "weights": (None, "_save"),
    "random state": (None, "_save_rng_state"),
    "optimizer": (None, "_save_optimizer_and_scheduler"),
    "manifest": (checkpoints, "_write_manifest"),
    "rotation": (checkpoint_saving, "rotate"),
}
MOMENTS = {**SAVING, "micro-batch": (None, "training_step")}


class Setup(NamedTuple):
    """A run that is repeated: optimizer, its arguments, processes."""

    optim: str
    optim_args: str
    processes: int

    def __str__(self):
        return f"{self.optim} {self.optim_args} ×{self.processes}"


class Moment(NamedTuple):
    """Where a run signals itself, in its first process."""

    name: str
    call: int
    signum: signal.Signals = signal.SIGKILL


def warm_up(folder):
    """Make this process import all that a run needs, and forget that it was one."""
    # Its own lock is one between processes, which a killed one would hold for ever.
    tqdm.set_lock(threading.RLock())
    trainer = make_trainer(folder, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def log_of(folder, rank):
    """Where a process writes: beside the folder, which may be a full disk."""
    return folder.with_name(f"{folder.name}-log-{rank}.txt")


def start(setup, folder, moment=None):
    """Fork the processes of a run that goes on from what `folder` holds; their ids."""
    port = free_port()
    return [_fork(setup, folder, rank, port, moment if rank == 0 else None) for rank in range(setup.processes)]


def _fork(setup, folder, rank, port, moment):
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open(log_of(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)  # a test runner has its own
        if setup.processes > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(setup.processes),
                LOCAL_WORLD_SIZE=str(setup.processes),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            )
        code = _run(setup, folder, rank, moment)
    except KeyboardInterrupt:  # of a signal that came before training or after it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException as error:
        traceback.print_exc()
        if "gloo/transport" in str(error):
            code = LOST
    finally:
        os._exit(code)


def _run(setup, folder, rank, moment):
    logging.set_verbosity_warning()
    trainer = make_trainer(
        folder / "out",
        optim=setup.optim,
        optim_args=setup.optim_args,
        max_steps=STEPS,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
    )
    if moment is not None:
        _signal_at(trainer, moment)
    try:
        whole = checkpoints.newest_whole(folder / "out").checkpoint
        if setup.processes > 1:
            dist.barrier()  # until all have looked
        if rank == 0:
            # Whole or not at all: a kill may come at any moment.
            unfinished = folder / "started.json.tmp"
            unfinished.write_text(json.dumps(checkpoints.step_of(whole) if whole else 0))
            unfinished.replace(folder / "started.json")
        trainer.train(resume_from_checkpoint=True if whole else None)
    except TrainingStopped as stopped:
        if setup.processes > 1:
            dist.barrier()
        return stopped.code
    except CheckpointError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    if rank == 0:
        losses = [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]
        digest = hashlib.sha256()
        for parameter in trainer.model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        result = json.dumps({"weights": digest.hexdigest(), "losses": losses})
        (folder / "result.json.new").write_text(result)
        (folder / "result.json.new").rename(folder / "result.json")
    if setup.processes > 1:
        dist.barrier()
    return 0


def _signal_at(trainer, moment):
    owner, name = MOMENTS[moment.name]
    owner = trainer if owner is None else owner
    function, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == moment.call:
            os.kill(os.getpid(), moment.signum)
        return function(*args, **kwargs)

    setattr(owner, name, counted)


def wait(pids, timeout=120):
    """The exit codes, negative for a signal. When one process was killed the others are, as a launcher does.

    Raises:
        TimeoutError: one did not end.
    """
    codes = {}
    deadline = time.monotonic() + timeout
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        lost = any(code not in (0, 128 + 15, 128 + 2, 128 + 10) for code in codes.values())
        hung = time.monotonic() > deadline
        if lost or hung:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
        if hung:
            raise TimeoutError(f"processes {pids} did not end in {timeout} seconds; ended: {codes}")
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def result_of(folder):
    path = Path(folder) / "result.json"
    return json.loads(path.read_text()) if path.exists() else None
