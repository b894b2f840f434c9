"""One training of pretrain_gpu.py: a GPT-2 from scratch with the stock Trainer, and the row that says how it went."""

from __future__ import annotations

import gc
import math
import os
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import hf_mars
from hf_mars.sweep.curves import diverged, final_loss, read_log, seconds_per_step
from hf_mars.sweep.plan import Run
from hf_mars.trainer.names import RUN_LOG_VARIABLE
from hf_mars.trainer.run_log import RunLog

STDERR_LINES = 15
DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class Blocks(torch.utils.data.Dataset):
    """The first `count` blocks of a text's tokens."""

    def __init__(self, tokens: np.ndarray, block_size: int, count: int, vocab_size: int):
        self._tokens, self._block_size, self._count, self._vocab_size = tokens, block_size, count, vocab_size

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        block = self._tokens[i * self._block_size : (i + 1) * self._block_size]
        tokens = torch.from_numpy(block.astype(np.int64))
        if tokens.max() >= self._vocab_size:  # on a GPU it would end all runs
            raise ValueError(f"the text has token {int(tokens.max())} and --vocab_size is {self._vocab_size}")
        return {"input_ids": tokens, "labels": tokens}


class Task(NamedTuple):
    """The same for all runs.

    Attributes:
        model: the configuration, as far as it is not that of GPT-2 small.
        vocab_size: tokens of the tokenizer.
        block_size: tokens of a block.
        update: blocks of an update.
        device_batch: blocks of a forward pass.
        train, held_out: what is trained on and evaluated.
        on_gpu: else on the CPU.
        command, git_commit: for the rows.
    """

    model: dict[str, int]
    vocab_size: int
    block_size: int
    update: int
    device_batch: int
    train: Blocks
    held_out: Blocks
    on_gpu: bool
    command: list[str]
    git_commit: str | None

    @property
    def tokens_per_step(self) -> int:
        return self.update * self.block_size


def make(run: Run, task: Task, steps: int, evaluations: int, *callbacks: TrainerCallback) -> dict[str, Any]:
    """Train, and say how it went: a row as in the sweep's results.jsonl. A failure is a row too.

    Args:
        run: the setting and the seed.
        task: the rest.
        steps: updates; the schedule is as long.
        evaluations: how many there are, the last one at the end.
        callbacks: of the Trainer.
    """
    began, clock = time.strftime("%Y-%m-%dT%H:%M:%S%z"), time.monotonic()
    measured: dict[str, Any] = {"peak_memory_bytes": None, "evaluation_seconds": None, "problem": None, "stderr": []}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        log.touch()
        try:
            measured |= _train(run, task, steps, evaluations, folder, [_run_log(log), *callbacks])
        except Exception as error:
            lines = traceback.format_exc().splitlines()
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            measured |= {"problem": problem, "stderr": lines[-STDERR_LINES:]}
        gc.collect()
        if task.on_gpu:
            torch.cuda.empty_cache()
        logged = read_log(log)
    return {
        "kind": "run",
        "optimizer": run.setting.label,
        "arguments": dict(run.setting.arguments),
        "seed": run.seed,
        **_outcome(logged, task.tokens_per_step, measured["problem"]),
        **measured,
        "train_tokens": len(task.train) * task.block_size,
        "wall_seconds": round(time.monotonic() - clock, 2),
        "jobs": 1,
        "began": began,
        "folder": f"{run.setting.slug()}-seed{run.seed}",
        "command": task.command,
        "git_commit": task.git_commit,
    }


def _run_log(path: Path) -> RunLog:
    os.environ[RUN_LOG_VARIABLE] = str(path)
    try:
        return RunLog()
    finally:
        del os.environ[RUN_LOG_VARIABLE]


def _train(
    run: Run, task: Task, steps: int, evaluations: int, folder: str, callbacks: list[TrainerCallback]
) -> dict[str, Any]:
    """Train. Returns what the run's log does not have."""
    batch = str(task.device_batch)
    words = ["--output_dir", folder, *run.arguments(), "--bf16", "--lr_scheduler_type", "cosine"]
    words += ["--max_steps", str(steps), "--warmup_steps", str(steps // 10)]
    words += ["--eval_strategy", "steps", "--eval_steps", str(steps // evaluations), "--prediction_loss_only"]
    words += ["--per_device_train_batch_size", batch, "--per_device_eval_batch_size", batch]
    words += ["--gradient_accumulation_steps", str(task.update // task.device_batch)]
    words += ["--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true"]
    words += [] if task.on_gpu else ["--use_cpu"]
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(words)
    if task.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    set_seed(args.seed)
    rows = math.ceil(task.vocab_size / 64) * 64  # of the embedding: matrix units like them so; the last are no tokens
    special = {"bos_token_id": None, "eos_token_id": None}  # the tokenizer has none
    config = GPT2Config(vocab_size=rows, n_positions=task.block_size, **task.model, **DROPOUT, **special)
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # else Trainer divides by each block's first label too, which is no target
    trainer = Trainer(model, args, train_dataset=task.train, eval_dataset=task.held_out, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seconds = [row["eval_runtime"] for row in trainer.state.log_history if "eval_runtime" in row]
    return {
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if task.on_gpu else None,
        "evaluation_seconds": sum(seconds) / len(seconds),
    }


def _outcome(log: dict[str, Any], tokens_per_step: int, problem: str | None) -> dict[str, Any]:
    """The part of a row that the run's log tells."""
    begin, training = log.get("begin", {}), log.get("training", [])
    final = final_loss(log) if log else None
    seconds = seconds_per_step(training)
    curves = {
        kind: [
            [p.step, round(p.loss, 6) if math.isfinite(p.loss) else None, p.seconds, p.step * tokens_per_step]
            for p in log.get(kind, [])
        ]
        for kind in ("training", "evaluation")
    }
    return {
        "status": "failed" if problem else "diverged" if diverged(log) else "complete",
        "exit_code": 1 if problem else 0,
        "final_loss": final[0] if final and math.isfinite(final[0]) and not problem else None,
        "loss_of": final[1] if final else None,
        "steps": log.get("end"),
        "max_steps": begin.get("max_steps"),
        "seconds": training[-1].seconds if training else None,
        "seconds_per_step": seconds,
        "tokens_per_second": round(tokens_per_step / seconds) if seconds else None,
        "state_bytes": log.get("state_bytes"),
        **{name: begin.get(name) for name in ("parameters", "initial", "hardware")},
        "versions": {**begin.get("versions", {}), "hf_mars": hf_mars.__version__, "cuda": torch.version.cuda},
        **curves,
    }
