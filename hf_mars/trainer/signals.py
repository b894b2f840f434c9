"""SIGTERM, SIGINT and SIGUSR1: a run finishes its update, saves a whole checkpoint and ends with 128 + the number."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A launcher and a scheduler both send the signal, or a terminal and a launcher: within this time they are one.
SAME_SIGNAL = 2.0  # seconds


class TrainingStopped(SystemExit):
    """A signal has ended a run, after a checkpoint was saved. Not caught, it ends the process.

    Attributes:
        code: 128 + the signal's number, as a shell reports a process that a signal has ended; schedulers restart it.
        checkpoint: the folder that was saved.
    """

    def __init__(self, signum: int, checkpoint: Path):
        super().__init__(128 + signum)
        self.checkpoint = checkpoint


class StopOnSignal(TrainerCallback):
    """Ends training at the end of an update, in all processes at the same one, after a signal to any of them.

    Processes tell each other through the store of torch.distributed, which is no collective: the one that sees the
    signal at the end of update t names t + 1, and no other can be past that, since updates need them all.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._received_at = 0.0
        self._stopping: int | None = None
        self._runs = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside, where the process leaves them to their default handlers."""
        self._received = self._stopping = None
        self._runs += 1
        replaced = {}
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):
                    replaced[signum] = signal.signal(signum, self._note)
        try:
            yield
        finally:
            for signum, handler in replaced.items():
                signal.signal(signum, handler)
        if self._received is not None and self._stopping is None:  # it came too late to stop at an update
            os.kill(os.getpid(), self._received)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received, self._received_at = signum, now
        elif now - self._received_at > SAME_SIGNAL:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        stop_at, signum = self._agreed(args, state.global_step)
        if stop_at is None or state.global_step < stop_at:
            return
        self._stopping = signum
        if control.should_evaluate:
            logger.warning(f"the evaluation due at step {state.global_step} is left out")
        control.should_save, control.should_evaluate, control.should_training_stop = True, False, True

    def _agreed(self, args: TrainingArguments, step: int) -> tuple[int | None, int | None]:
        """The step to stop after and the signal's number; None, None if there is none."""
        if args.world_size == 1 or not dist.is_initialized():
            return (None if self._received is None else step), self._received
        store = dist.distributed_c10d._get_default_store()
        key = f"hf_mars/stop/{self._runs}"
        if not store.check([key]):
            if self._received is None:
                return None, None
            store.set(key, f"{step + 1} {self._received}")
        stop_at, signum = store.get(key).split()
        return int(stop_at), int(signum)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._stopping is None:
            return
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            name = signal.Signals(self._stopping).name
            logger.warning(f"{name}: stopped after step {state.global_step}; go on from {checkpoint}")
        raise TrainingStopped(self._stopping, checkpoint)
