"""The output folder: where a run starts, and what it may remove there."""

import re
from pathlib import Path

from hf_mars import MarsTrainingArguments

from .arguments import RunArguments
from .errors import UsageError
from .log import logger

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
RESULT_FILES = ("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")


def checkpoint_to_resume(training_args: MarsTrainingArguments, run_args: RunArguments) -> str | None:
    """The checkpoint to go on from; None to start at step 0.

    Raises:
        UsageError: the checkpoint asked for does not exist or is incomplete, or the run would write over the
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
    if mode in ("true", "auto"):
        checkpoint = last_checkpoint(output_dir)
        if checkpoint is None and mode == "true":
            raise UsageError(
                f"--resume_from_checkpoint {asked}: there is no complete checkpoint in --output_dir {output_dir}; "
                "with auto the run would start anew"
            )
        if checkpoint is None and {"config.json", "adapter_config.json"} & set(content):
            raise UsageError(
                f"--resume_from_checkpoint {asked}: --output_dir {output_dir} holds a finished model but no complete "
                "checkpoint; replace the model with --overwrite_output_dir, or choose another folder"
            )
    else:
        checkpoint = Path(asked)
        if not (checkpoint / "trainer_state.json").is_file():
            raise UsageError(
                f"--resume_from_checkpoint {asked}: is no folder with a complete checkpoint; "
                "allowed: true, auto, false or the path of a checkpoint-N folder"
            )
        if content and checkpoint.resolve().parent != output_dir.resolve():
            raise UsageError(
                f"--resume_from_checkpoint {asked}: lies outside of --output_dir {output_dir}, which is not empty; "
                "choose an empty folder, or the checkpoint's own"
            )
    if checkpoint is None:
        return None
    if not [*checkpoint.glob("optimizer*"), *checkpoint.glob("global_step*")]:
        raise UsageError(
            f"--resume_from_checkpoint {asked}: {checkpoint} has no optimizer state (was it saved with "
            "--save_only_model?); start a new run from its weights with --model_name_or_path"
        )
    return str(checkpoint)


def last_checkpoint(output_dir: Path) -> Path | None:
    """The complete checkpoint-N with the largest N. The trainer state is written last, so it marks a complete one."""
    found = [(int(match[1]), path) for path in output_dir.glob("*") if (match := CHECKPOINT.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        if (path / "trainer_state.json").is_file():
            return path
        logger.warning(f"{path} is incomplete and is passed over")
    return None


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
