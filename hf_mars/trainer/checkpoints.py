"""Which checkpoints of a Trainer are whole: the manifest that says so, and what is found wrong without one.

A save begins by leaving transformers' own mark of an unfinished checkpoint and removing the folder's manifest; it ends
by writing the manifest when the files of all processes are there, and removing the mark. Imports the standard library
alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint_files import SMALL, file_fault, folder_fault

logger = logging.getLogger(__name__)

MANIFEST = "mars_manifest.json"
MANIFEST_FORMAT = 1
UNFINISHED = "checkpoint-is-incomplete.txt"  # transformers' name (trainer_jit_checkpoint.py)
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or saved. The message is one sentence."""


class ResumeError(CheckpointError):
    """A whole checkpoint that this run's arguments cannot go on from."""


class Search(NamedTuple):
    """Where a run goes on.

    Attributes:
        checkpoint: the newest whole checkpoint; None if there is none.
        passed_over: newer ones, or ones of later steps, and why they do not count.
    """

    checkpoint: Path | None
    passed_over: list[tuple[Path, str]]

    def reasons(self) -> str:
        """The checkpoints passed over, in one clause."""
        return "; ".join(f"{path.name} ({why})" for path, why in self.passed_over)


def other_optimizer(folder: Path, saved: str, own: str) -> ResumeError:
    """The error of a run under the name `own` that is to go on from a checkpoint of the optimizer `saved`."""
    return ResumeError(
        f"{folder}: the checkpoint was saved with optim={saved!r}, but this run has optim={own!r}, whose state is "
        f"another: go on with {saved}, or start a new run from its weights"
    )


def other_meaning(setting: str, old: Any, new: Any, name: str) -> str:
    """Why a run whose optimizer is `name` does not go on from a checkpoint that was saved with another setting."""
    return (
        f"the checkpoint was saved with {setting}={old!r}, but this run ({name}) has {setting}={new!r}, which gives "
        "its state another meaning: go on with the setting that it was saved with, or start a new run from its weights"
    )


# ---- saving ----


def begin(folder: Path) -> None:
    """Mark a checkpoint as unfinished, before its first file is written.

    A symbolic link of that name is removed first, so that what it points to is not written over.

    Args:
        folder: of the checkpoint; made if it is not there.
    """
    if folder.is_symlink():
        logger.warning(
            f"{folder} is a symbolic link to {folder.resolve()}, which stays as it is; a folder replaces it"
        )
        folder.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).write_text("This checkpoint is being saved, or its save was cut off.\n")
    (folder / MANIFEST).unlink(missing_ok=True)


def finish(folder: Path, facts: dict[str, Any], *, checksums: str = "small") -> None:
    """Write the manifest of a checkpoint whose files are all there, in one go, and remove the mark of `begin`.

    Args:
        folder: of the checkpoint.
        facts: about the run, which the manifest keeps: step, world_size, engine, zero_stage, optimizer.
        checksums: "small" for those of files below 64 MiB, "full" for all.
    """
    files: dict[str, dict[str, Any]] = {}
    for path in _files(folder):
        entry = files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size}
        if checksums == "full" or entry["bytes"] < SMALL:
            entry["sha256"] = _sha256(path)
    _write_manifest(folder, {"format": MANIFEST_FORMAT, "saved_at": time.time(), **facts, "files": files})
    (folder / UNFINISHED).unlink(missing_ok=True)


def leave_branch(folder: Path) -> None:
    """Note in the manifest of a checkpoint that a run goes on from it, where there are later ones, and say so.

    They are of a branch that is left: `newest_whole` finds this checkpoint, or what is saved after it.
    """
    folders = checkpoints_in(folder.parent)
    later = folders[folders.index(folder) + 1 :] if folder in folders else []
    manifest = read_manifest(folder)
    if manifest is not None and later:
        _write_manifest(folder, {**manifest, "resumed_at": time.time()})
    if names := [path.name for path in later if fault(path) is None]:
        stay = "stays where it is" if len(names) == 1 else "stay where they are"
        logger.warning(
            f"going on from {folder}: {', '.join(names)} {stay}, on a branch that is left"
            + ("" if manifest else "; a later resume_from_checkpoint=True (or auto) takes the newest of them, though")
        )


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    new = folder / f".{MANIFEST}.{os.getpid()}"
    with new.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    new.replace(folder / MANIFEST)


def _files(folder: Path) -> Iterator[Path]:
    """The files of a checkpoint that a manifest lists."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != UNFINISHED and MANIFEST not in path.name:
            yield path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- is it whole? ----


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; None if it has none.

    Raises:
        ValueError: there is one that cannot be read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if not (isinstance(manifest, dict) and isinstance(manifest.get("files"), dict)):
        raise ValueError("it lists no files")
    if manifest.get("format") != MANIFEST_FORMAT:
        raise ValueError(
            f"its format is {manifest.get('format')!r}, and this version of hf_mars reads {MANIFEST_FORMAT}"
        )
    return manifest


def fault(folder: Path, *, checksums: bool = True) -> str | None:
    """What keeps a run from going on from a checkpoint, in a few words; None if it is whole.

    Args:
        folder: of the checkpoint.
        checksums: compare those that the manifest has, which reads the files.
    """
    try:
        return _fault(folder, checksums)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"cannot be read: {type(error).__name__}: {error}"


def _fault(folder: Path, checksums: bool) -> str | None:
    if not folder.is_dir():
        return "is no folder"
    if (folder / UNFINISHED).exists():
        return "was not saved to its end"
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return f"{MANIFEST} cannot be read: {error}"
    if manifest is None:
        return folder_fault(folder, list(_files(folder)))
    for name, saved in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != saved["bytes"]:
            return f"{name} has {size} bytes instead of {saved['bytes']}"
        if "sha256" not in saved:
            if found := file_fault(path):
                return found
        elif checksums and _sha256(path) != saved["sha256"]:
            return f"{name} is not what was saved: its checksum is another"
    return folder_fault(folder, [folder / name for name in manifest["files"]], parts_only=True)


# ---- which one? ----


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The folders checkpoint-N of a run, the latest last.

    That is the largest N, except where manifests tell of branches: a checkpoint of an earlier step that was saved or
    resumed later comes after those of the branch that was left. What has no manifest counts by the time of its state.
    """
    found = [(int(match[1]), path) for path in output_dir.glob("*") if (match := CHECKPOINT.fullmatch(path.name))]
    found = [(step, path) for step, path in found if path.is_dir()]
    if not any((path / MANIFEST).exists() for _, path in found):
        return [path for _, path in sorted(found)]  # the times of files do not outlive a copy
    return [path for _, _, path in sorted((_last_used(path), step, path) for step, path in found)]


def _last_used(folder: Path) -> float:
    try:
        manifest = read_manifest(folder)
        if manifest is not None:
            return max(manifest["saved_at"], manifest.get("resumed_at", 0.0))
        return (folder / "trainer_state.json").stat().st_mtime
    except (OSError, ValueError):
        return folder.stat().st_mtime  # it is not whole, and only to be named


def newest_whole(output_dir: Path) -> Search:
    """The checkpoint that a run in `output_dir` goes on from."""
    passed_over: list[tuple[Path, str]] = []
    folders = checkpoints_in(output_dir) if output_dir.is_dir() else []
    while folders:
        folder = folders.pop()
        why = fault(folder)
        if why is None:
            passed_over += [
                (path, "of a branch that was left for an earlier step")
                for path in folders
                if step_of(path) > step_of(folder)
            ]
            return Search(folder, passed_over)
        passed_over.append((folder, why))
    return Search(None, passed_over)


def step_of(folder: Path) -> int:
    """The N of checkpoint-N; -1 for another name."""
    match = CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match else -1


def check_whole(folder: Path) -> None:
    """Raise a CheckpointError if a run cannot go on from a checkpoint; it names the newest whole one beside it."""
    why = fault(folder)
    if why is not None:
        newest = newest_whole(folder.parent).checkpoint
        instead = f"the newest whole checkpoint there is {newest}" if newest else "no checkpoint there is whole"
        raise CheckpointError(f"{folder} {_clause(why)}; {instead}")


def _clause(why: str) -> str:
    return why if why.startswith(("is ", "was ", "has ", "cannot ")) else f"is not whole: {why}"
