"""Saving and choosing checkpoints in a Trainer, by what `checkpoints` says of them."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from . import checkpoints
from .checkpoints import CheckpointError, ResumeError
from .names import VARIANTS, optim_name
from .nodes import once_per_node

logger = logging.get_logger(__name__)


# ---- saving ----

being_saved: set[Path] = set()  # output folders with an unfinished checkpoint of this process


@contextlib.contextmanager
def whole_checkpoint(trainer: Trainer, folder: Path) -> Iterator[None]:
    """Around the save of a checkpoint, in all processes: mark it as unfinished, then write its manifest.

    Older checkpoints are deleted only then (`save_total_limit`), so that there is always a whole one.

    Args:
        trainer: that saves.
        folder: of the checkpoint.

    Raises:
        CheckpointError: the files cannot be written, as on a full disk.
    """
    args = trainer.args
    being_saved.add(folder.parent)
    try:
        if args.should_save:
            checkpoints.begin(folder)
        trainer.accelerator.wait_for_everyone()
        yield
        trainer.accelerator.wait_for_everyone()
        if args.should_save:
            checkpoints.finish(folder, facts(trainer), checksums=getattr(args, "checkpoint_checksums", "small"))
            rotate(folder.parent, args.save_total_limit, trainer.state.best_model_checkpoint)
        trainer.accelerator.wait_for_everyone()
    except Exception as error:
        if not is_write_error(error):
            raise
        raise CheckpointError(not_saved(folder, error)) from error
    finally:
        being_saved.discard(folder.parent)


def facts(trainer: Trainer) -> dict[str, Any]:
    """What a manifest says about the run."""
    return {
        "step": trainer.state.global_step,
        "world_size": trainer.args.world_size,
        "engine": trainer.accelerator.distributed_type.value,
        "zero_stage": _zero_stage(trainer.args),
        "optimizer": optim_name(trainer.args),
    }


def _zero_stage(args: TrainingArguments) -> int | None:
    return None if args.deepspeed_plugin is None else int(args.deepspeed_plugin.zero_stage)


def rotate(run_dir: Path, save_total_limit: int | None, best_model_checkpoint: str | None) -> None:
    """Delete the oldest whole checkpoints beyond `save_total_limit`, but for the newest and the best.

    Those that are not whole are neither counted nor deleted: a run that starts anew beside them leaves them to the
    user.
    """
    if save_total_limit is None or save_total_limit <= 0:
        return
    newest = sort_checkpoints(str(run_dir), use_mtime=True)[-1]
    if why := checkpoints.fault(Path(newest), checksums=False):
        logger.warning(f"save_total_limit={save_total_limit}: nothing is deleted now, since {newest} {why}")
        return
    *older, _ = sort_checkpoints(str(run_dir), use_mtime=True, best_model_checkpoint=best_model_checkpoint)
    older = [folder for folder in older if checkpoints.fault(Path(folder), checksums=False) is None]
    best = None if best_model_checkpoint is None else str(Path(best_model_checkpoint))
    for folder in older[: max(0, len(older) + 1 - save_total_limit)]:
        if folder != best:
            shutil.rmtree(folder, ignore_errors=True)  # which leaves symbolic links


# In RuntimeErrors of torch.save, which does not tell why.
_TORCH_CANNOT_WRITE = ("failed writing file", "unexpected pos", "iostream error")


def is_write_error(error: BaseException) -> bool:
    """Whether an exception tells of a file that could not be written: the writers of weights have their own kinds."""
    if isinstance(error, OSError):
        return True
    text = str(error)
    return type(error).__name__ in ("RuntimeError", "SafetensorError") and (
        any(words in text for words in (*_TORCH_CANNOT_WRITE, "I/O error", "os error"))
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether that was for want of space."""
    return is_write_error(error) and (
        getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        or "No space left" in str(error)
        or any(words in str(error) for words in _TORCH_CANNOT_WRITE)
    )


def not_saved(folder: Path, error: BaseException) -> str:
    """Why a checkpoint was not saved, in one sentence."""
    free = shutil.disk_usage(folder.parent).free / 2**20
    newest = checkpoints.newest_whole(folder.parent).checkpoint
    return f"{folder} could not be saved ({' '.join(str(error).split())}); {free:,.0f} MiB are free there; " + (
        f"the newest whole checkpoint is {newest}" if newest else "there is no whole checkpoint"
    )


# ---- resuming ----


def checkpoint_to_load(args: TrainingArguments, asked: str | bool | None) -> str | None:
    """The checkpoint that a Trainer goes on from; None to begin at step 0.

    Args:
        args: the Trainer's.
        asked: as for `Trainer.train`.

    Raises:
        CheckpointError: in every process, if that checkpoint is not whole or there is none, or not everywhere; or if
            another optimizer or engine saved it whose state this run would misread or leave out.
    """
    if not asked:
        return None

    def find() -> str:
        if asked is not True:
            checkpoints.check_whole(Path(asked))
            folder = Path(asked)
        else:
            folder = newest_whole(Path(str(args.output_dir)), "resume_from_checkpoint=True")
        check_run(folder, args)
        if args.should_save and folder.parent.resolve() == Path(str(args.output_dir)).resolve():
            checkpoints.leave_branch(folder)
        return str(folder)

    return once_per_node(args, find)


def check_run(folder: Path, args: TrainingArguments) -> None:
    """Raise a ResumeError where a checkpoint's manifest tells of another optimizer, or otherwise of DeepSpeed or ZeRO.

    Other engines say so themselves. A manifest that cannot be read is a CheckpointError.
    """
    try:
        manifest = checkpoints.read_manifest(folder) or {}
    except ValueError as error:
        raise CheckpointError(f"{folder / checkpoints.MANIFEST}: {error}") from error
    saved, own = str(manifest.get("optimizer")), optim_name(args)
    if saved in VARIANTS and saved != own:
        raise checkpoints.other_optimizer(folder, saved, own)
    engine, deepspeed = manifest.get("engine"), DistributedType.DEEPSPEED.value
    if engine is not None and (engine == deepspeed) != (args.deepspeed_plugin is not None):
        with_or_without = "with" if engine == deepspeed else "without"
        raise ResumeError(
            f"{folder}: the checkpoint was saved {with_or_without} DeepSpeed, which keeps the optimizer's state in "
            f"files of its own: go on {with_or_without} it, or start a new run from its weights"
        )
    saved_stage, stage = manifest.get("zero_stage"), _zero_stage(args)
    are_alike = saved_stage == stage or {saved_stage, stage} == {1, 2}  # of which each has the other's files
    if not (saved_stage is None or stage is None or are_alike):
        raise ResumeError(
            f"{folder}: the checkpoint was saved under ZeRO stage {saved_stage}, but this run has stage {stage}, "
            f"whose files are others: go on under stage {saved_stage}, or start a new run from its weights"
        )
    processes = manifest.get("world_size")
    if saved_stage and processes not in (None, args.world_size):
        raise ResumeError(
            f"{folder}: the checkpoint was saved by {processes} processes under ZeRO, but this run has "
            f"{args.world_size}, and DeepSpeed does not share their slices out anew: go on with {processes}, or start "
            "a new run from its weights"
        )


def newest_whole(output_dir: Path, argument: str) -> Path:
    """The newest whole checkpoint, with one warning about those that were passed over.

    Args:
        output_dir: of the run.
        argument: that asks for it, for messages.

    Raises:
        CheckpointError: there is none.
    """
    search = checkpoints.newest_whole(output_dir)
    if search.checkpoint is None:
        raise CheckpointError(
            f"{argument}: there is no whole checkpoint in {output_dir}"
            + (f"; not whole: {search.reasons()}" if search.passed_over else "")
        )
    if search.passed_over:
        logger.warning(f"{argument}: takes {search.checkpoint} and passes over {search.reasons()}")
    return search.checkpoint


class MarsCheckpointCallback(TrainerCallback):
    """Gives the checkpoints of any Trainer the manifest that `MarsTrainer`'s have.

    Add it last: `trainer.add_callback(MarsCheckpointCallback(trainer))`. A Trainer that is not MarsTrainer still
    resumes by its own rule, and deletes by it: `newest_whole` finds the one to name.

    Args:
        trainer: that saves.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save and args.should_save and not state.is_hyper_param_search:
            checkpoints.begin(self._folder)

    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_hyper_param_search:
            return
        self.trainer.accelerator.wait_for_everyone()
        if args.should_save:
            checksums = getattr(args, "checkpoint_checksums", "small")
            checkpoints.finish(self._folder, facts(self.trainer), checksums=checksums)

    @property
    def _folder(self) -> Path:
        return Path(str(self.trainer.args.output_dir)) / f"checkpoint-{self.trainer.state.global_step}"
