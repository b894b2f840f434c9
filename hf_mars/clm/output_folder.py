"""The output folder: where a run starts, and what it may remove there."""

import shutil
import tempfile
from pathlib import Path

from hf_mars import MarsTrainingArguments
from hf_mars.trainer.checkpoint_files import NO_OPTIMIZER
from hf_mars.trainer.checkpoint_saving import newest_whole
from hf_mars.trainer.checkpoints import CHECKPOINT, CheckpointError, check_whole, checkpoints_in

from .arguments import RunArguments
from .errors import UsageError
from .log import logger

RESULT_FILES = ("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")
_WEIGHTS_ALONE = "; start a new run from its weights with --model_name_or_path"


def check_writable(output_dir: Path) -> None:
    """Raise UsageError if nothing can be written to output_dir, or it cannot be made."""
    existing = output_dir.absolute()
    try:
        existing = _existing(output_dir)
        why = "" if existing.is_dir() else "is no folder"
        if not why:
            with tempfile.TemporaryFile(dir=existing):  # file systems and rights have many ways to say no
                return
    except OSError as error:
        why = f"cannot be written to ({error.strerror})"
    where = "" if existing == output_dir.absolute() else f"{existing} "
    raise UsageError(f"--output_dir {output_dir}: {where}{why}; choose another folder")


def check_space(output_dir: Path, parameters: int, dtype: str | None) -> None:
    """Raise UsageError if there is no space for a checkpoint: the weights and as much again, the least that an
    optimizer keeps.

    Args:
        parameters: number of the model's.
        dtype: of its weights, as in --dtype; float32 if None.
    """
    least = 2 * parameters * (2 if dtype in ("bfloat16", "float16") else 4) / 2**20
    usage = shutil.disk_usage(_existing(output_dir))
    free = usage.free / 2**20
    if free < least and usage.total > 0:  # 0: a file system that does not tell
        raise UsageError(
            f"--output_dir {output_dir}: a checkpoint takes at least {least:,.1f} MiB, and {free:,.1f} MiB are free "
            "there; choose another disk, or --save_strategy no"
        )


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return _existing(path.parent)
    return path


def checkpoint_to_resume(training_args: MarsTrainingArguments, run_args: RunArguments) -> str | None:
    """The checkpoint to go on from; None to start at step 0.

    Raises:
        UsageError: the checkpoint asked for does not exist or is not whole, or the run would write over the
            content of output_dir without having been asked to.
    """
    output_dir = Path(str(training_args.output_dir))
    asked = str(training_args.resume_from_checkpoint)
    mode = asked.lower()
    content = sorted(path.name for path in output_dir.iterdir()) if output_dir.is_dir() else []

    if mode in ("none", "false"):
        if content and not run_args.overwrite_output_dir:
            raise UsageError(
                f"--output_dir {output_dir}: is not empty ({', '.join(content[:5])}{', …' if content[5:] else ''}); "
                "go on from its last checkpoint with --resume_from_checkpoint true, start anew and remove its "
                "checkpoints with --overwrite_output_dir, or choose another folder"
            )
        return None
    if run_args.overwrite_output_dir:
        raise UsageError(
            f"--resume_from_checkpoint {asked}: contradicts --overwrite_output_dir, which removes the checkpoints; "
            "drop one of the two"
        )
    try:
        return str(_named_or_newest(output_dir, asked, content))
    except CheckpointError as error:
        if mode != "auto" or NO_OPTIMIZER in str(error):
            raise UsageError(f"{error}{_WEIGHTS_ALONE if NO_OPTIMIZER in str(error) else ''}") from error
        if {"config.json", "adapter_config.json"} & set(content):
            raise UsageError(
                f"{error}, but a finished model; replace the model with --overwrite_output_dir, or choose another "
                "folder"
            ) from error
        if checkpoints_in(output_dir):
            logger.warning(
                f"{error}; the run starts anew, and these folders stay (save_total_limit does not count them), but "
                "for those of the steps that it saves itself"
            )
    return None


def _named_or_newest(output_dir: Path, asked: str, content: list[str]) -> Path:
    if asked.lower() in ("true", "auto"):
        return newest_whole(output_dir, f"--resume_from_checkpoint {asked}")
    checkpoint = Path(asked)
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"--resume_from_checkpoint {asked}: is no folder; allowed: true, auto, false or the path of a "
            "checkpoint-N folder"
        )
    if content and checkpoint.resolve().parent != output_dir.resolve():
        raise CheckpointError(
            f"--resume_from_checkpoint {asked}: lies outside of --output_dir {output_dir}, which is not empty; "
            "choose an empty folder, or the checkpoint's own"
        )
    check_whole(checkpoint)
    return checkpoint


def files_of_previous_run(output_dir: Path, sources: list[str | None]) -> list[Path]:
    """The paths that --overwrite_output_dir deletes: the checkpoints and result files in output_dir, and nothing else.

    The model and the tokenizer there stay until those of the new run replace them.

    Raises:
        UsageError: one of sources (the model, configuration and tokenizer of the new run) is among them.
    """
    stale = [path for path in output_dir.glob("*") if CHECKPOINT.fullmatch(path.name)]
    stale += [output_dir / name for name in RESULT_FILES if (output_dir / name).exists()]
    for source in filter(None, sources):
        for path in stale:
            if Path(source).resolve().is_relative_to(path.resolve()):
                raise UsageError(
                    f"--overwrite_output_dir: would remove {path}, which this run reads; choose another --output_dir"
                )
    return stale
