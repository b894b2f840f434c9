"""A run's losses and clock in one file: what `python -m hf_mars.sweep` reads of every run."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .names import RUN_LOG_VARIABLE

# A run has this many rows, or more where its script logs more often.
ROWS = 100
# How many tokens have been trained on: transformers' key, and TRL's, which counts without being asked.
TOKENS = ("num_input_tokens_seen", "num_tokens", "eval_num_tokens")


class RunLog(TrainerCallback):
    """Appends to the file that the environment variable `HF_MARS_SWEEP_LOG` names, which must exist.

    One JSON object per line: {"begin": {…}} when a training begins (the last one counts), {"step", "seconds", "loss"}
    or {"step", "seconds", "eval_loss"} (losses as the Trainer logs them, and "tokens" where it counts them),
    {"state_bytes": …} after the first step, {"end": step}. "seconds" is the time since training began without that of
    evaluating and saving. NaN stays NaN.
    """

    def __init__(self) -> None:
        self._path = os.environ[RUN_LOG_VARIABLE]
        self._begin = self._mark = time.perf_counter()
        self._other = 0.0  # seconds of evaluating and saving
        self._training = self._has_state_bytes = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # True, transformers' default, logs a loss of 0 for steps whose loss is NaN.
        args.logging_nan_inf_filter = False
        self._training, self._has_state_bytes, self._other = True, False, 0.0
        trained = [_local(p.detach()) for p in kwargs["model"].parameters() if p.requires_grad]
        self._write(
            state,
            begin={
                "max_steps": state.max_steps,
                "parameters": sum(p.numel() for p in trained),
                # Runs that begin from the same weights have the same sum.
                "initial": sum(p.sum(dtype=torch.float32).item() for p in trained),
                "versions": _versions(),
                "hardware": _hardware(args),
            },
        )
        self._begin = self._mark = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._has_state_bytes:
            self._has_state_bytes = True
            self._write(state, state_bytes=_state_bytes(kwargs.get("optimizer")))
        if state.global_step % max(1, state.max_steps // ROWS) == 0:
            control.should_log = True
        if (control.should_evaluate or control.should_save) and args.device.type == "cuda":
            torch.cuda.synchronize()  # the steps' work is theirs
        self._mark = time.perf_counter()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        losses = {key: float(value) for key, value in logs.items() if re.fullmatch(r"loss|eval_(\w+_)?loss", key)}
        if any(key != "loss" for key in losses):
            self._leave_out()
        if losses:
            counts = [logs[key] for key in TOKENS if key in logs]
            tokens = {"tokens": counts[0]} if counts else {}
            # After training the clock stands still: a last evaluation is no training.
            self._write(state, step=state.global_step, seconds=self._seconds(), **losses, **tokens)
        if self._training:
            self._mark = time.perf_counter()

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._leave_out()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self._leave_out()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._mark = time.perf_counter()
        self._write(state, end=state.global_step)
        self._training = False

    def _leave_out(self) -> None:
        """Take the time since the last mark out of the run's seconds."""
        if self._training:
            now = time.perf_counter()
            self._other += now - self._mark
            self._mark = now

    def _seconds(self) -> float:
        now = time.perf_counter() if self._training else self._mark
        return round(now - self._begin - self._other, 4)

    def _write(self, state: TrainerState, **row: Any) -> None:
        if not state.is_world_process_zero:
            return
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        except FileNotFoundError:
            raise SystemExit(f"{self._path} is gone: the sweep that began this run has given it up") from None
        with os.fdopen(file, "w") as log:
            log.write(json.dumps(row) + "\n")


def _state_bytes(optimizer: Any) -> int:
    """Bytes of the optimizer's state on this process; tensors of one number (steps) count too."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    return sum(tensor.nbytes for tensor in _tensors(getattr(optimizer, "state", {}).values()))


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield _local(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "hf_mars"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # a checkout that is not installed
            continue
    return versions


def _hardware(args: TrainingArguments) -> dict[str, Any]:
    """The machine, and how many processes and threads of it this run has."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        cpu = found[1] if found else cpu
    hardware: dict[str, Any] = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    hardware |= {"device": args.device.type, "processes": args.world_size}
    if args.device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(args.device)
    return hardware
