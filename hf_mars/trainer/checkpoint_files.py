"""Damage to a checkpoint that shows without a manifest: files that are missing, cut or overwritten."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

SMALL = 64 << 20  # bytes: files below are read whole
STATE = "trainer_state.json"
NO_OPTIMIZER = "has no optimizer state (was it saved with --save_only_model?)"

# As transformers, accelerate and DeepSpeed name them, in the checkpoint or as folders in it.
_OPTIMIZER = re.compile(r"optimizer\.(pt|bin)|optimizer_\d+|rank\d+-of-\d+-optimizer\.pt|global_step\d+")
_WEIGHTS = re.compile(
    r"(model|adapter_model|pytorch_model)[\w.-]*\.(safetensors|bin)|pytorch_model_fsdp[\w.-]*|global_step\d+"
)
_RANDOM_STATE = re.compile(r"rng_state(?:_(\d+))?\.pth")


def folder_fault(folder: Path, files: list[Path], *, parts_only: bool = False) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if nothing is seen.

    Args:
        folder: of the checkpoint.
        files: in it, at any depth.
        parts_only: ask only for what a checkpoint must have, not whether each file can be read.
    """
    names = {path.relative_to(folder).parts[0] for path in files}
    if STATE not in names:
        return f"{STATE} is missing"
    if not any(map(_OPTIMIZER.fullmatch, names)):
        return NO_OPTIMIZER
    if not any(map(_WEIGHTS.fullmatch, names)):
        return "the model's weights are missing"
    if any(name.startswith("adapter_model.") for name in names) and "adapter_config.json" not in names:
        return "adapter_config.json is missing"  # without which PEFT loads no adapters
    is_deepspeed = any(name.startswith("global_step") for name in names)
    if "scheduler.pt" not in names and not is_deepspeed:
        return "scheduler.pt is missing"
    if missing := _missing_random_state(names):
        return f"{missing} is missing"
    if parts_only:
        return None
    for path in files:
        if found := file_fault(path):
            return found
    for index in (path for path in files if path.name.endswith(".index.json")):
        for shard in sorted(set(json.loads(index.read_bytes()).get("weight_map", {}).values())):
            if not (index.parent / shard).is_file():
                return f"{shard} is missing"
    return _state_fault(folder)


def _missing_random_state(names: set[str]) -> str | None:
    matches = [match for match in map(_RANDOM_STATE.fullmatch, names) if match]
    ranks = {int(match[1]) for match in matches if match[1]}
    if not matches:
        return "rng_state.pth"
    if any(match[1] is None for match in matches):
        return None
    # A node that shares no disk with the others has those of its own processes.
    gap = set(range(min(ranks), max(ranks))) - ranks
    return f"rng_state_{min(gap)}.pth" if gap else None


def _state_fault(folder: Path) -> str | None:
    step = json.loads((folder / STATE).read_bytes()).get("global_step")
    if not isinstance(step, int):
        return f"{STATE} has no global_step"
    if folder.name.startswith("checkpoint-") and folder.name != f"checkpoint-{step}":
        return f"{STATE} is that of step {step}"
    return None


def file_fault(path: Path) -> str | None:
    """What is wrong with a file, by the structure that its kind has, in a few words; None if nothing is seen."""
    check = _CHECKS.get(path.suffix)
    if check is None:
        return None
    try:
        check(path)
    except (ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error, NotImplementedError) as e:
        return f"{path.name} cannot be read: {e}"
    return None


def _check_json(path: Path) -> None:
    if path.stat().st_size < SMALL and not isinstance(json.loads(path.read_bytes()), (dict, list)):
        raise ValueError("it holds no mapping")


def _check_zip(path: Path) -> None:
    """torch.save's format. Small ones are compared with the checksums that they hold."""
    with zipfile.ZipFile(path) as file:
        if path.stat().st_size < SMALL and (damaged := file.testzip()):
            raise ValueError(f"{damaged} in it is damaged")


def _check_safetensors(path: Path) -> None:
    """The header's length, the header, and tensors up to the end of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError("its header is cut off")
        header = json.loads(file.read(length))
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if 8 + length + end != size:
        raise ValueError(f"it has {size} bytes, and its header tells of {8 + length + end}")


_CHECKS: dict[str, Callable[[Path], None]] = {
    ".json": _check_json,
    ".pt": _check_zip,
    ".pth": _check_zip,
    ".bin": _check_zip,
    ".safetensors": _check_safetensors,
}
