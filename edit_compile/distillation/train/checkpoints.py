"""What a run resumes from: folders of one JSON and one safetensors file, each complete or not there at all.

A checkpoint is written beside its place, flushed to disk, and moved there whole. The last few are kept. Nothing is pickled.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from edit_compile.distillation.train.spike_guard import SpikeGuard
from edit_compile.errors import DistillError
from edit_compile.files import flush, sha256
from edit_compile.frozen import Frozen, first_problem
from edit_compile.version import __version__

FORMAT = 2
_JSON, _TENSORS, _TEMPORARY = "state.json", "state.safetensors", "unfinished-"
log = logging.getLogger(__name__)


class CheckpointMetadata(Frozen):
    """Where a run stands: what is saved beside its tensors."""

    version: int = FORMAT
    package_version: str = __version__
    recipe: dict[str, Any]
    phase: int
    """The number of the phase."""
    step: int
    """How many of the phase's steps are done."""
    total: int
    """Steps done in all phases."""
    averages: int
    """Updates of the moving average."""
    guard: SpikeGuard
    numbers: dict[str, int | float]
    """What the optimizer keeps besides tensors, by name."""
    before: dict[str, Any]
    """The validation error before training."""
    seconds: float
    """Of training."""
    sha256: str = ""
    """Of the tensors' file."""


Checkpoint = tuple[CheckpointMetadata, dict[str, Tensor]]


def save_checkpoint(folder: Path, metadata: CheckpointMetadata, tensors: dict[str, Tensor], keep_last: int) -> Path:
    """Add a checkpoint to a folder of them, and remove all but the last `keep_last`.

    Raises:
        DistillError: it cannot be written; names the last that was.
    """
    place = checkpoint_path(folder, metadata.total)
    if place in list_checkpoints(folder) and _is_complete(place):
        return place  # a run that was resumed comes by again, with the same bits
    temporary = folder / f"{_TEMPORARY}{metadata.total:08d}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / _TENSORS)
        metadata = metadata.model_copy(update={"sha256": sha256(temporary / _TENSORS)})
        (temporary / _JSON).write_text(metadata.model_dump_json(indent=2))
        for path in (temporary / _TENSORS, temporary / _JSON, temporary):
            flush(path)
        if place.exists():
            shutil.rmtree(place)
        os.replace(temporary, place)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DistillError(f"checkpoint {place} cannot be written: {error}; {describe_last(folder)}") from error
    for old in list_checkpoints(folder)[:-keep_last]:
        _remove(old)
    return place


def checkpoint_path(folder: Path, total: int) -> Path:
    """Return where the checkpoint after a number of steps is."""
    return folder / f"{total:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if (path / _JSON).is_file())


def describe_last(folder: Path) -> str:
    """Say which checkpoint is the last."""
    found = list_checkpoints(folder)
    return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def load_newest(folder: Path) -> Checkpoint | None:
    """Read the newest usable checkpoint; others are logged and passed over. None if there is no checkpoint.

    Raises:
        DistillError: there are some, but none can be used.
    """
    reasons = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return _read(path)
        except (OSError, ValueError, SafetensorError) as error:
            log.warning("checkpoint %s cannot be used: %s; trying the one before", path, error)
            reasons.append(f"{path.name}: {error}")
    if reasons:
        raise DistillError(f"no checkpoint in {folder} can be used: {reasons[0]}; remove the folder to start again")
    return None


def _is_complete(checkpoint: Path) -> bool:
    try:
        _read(checkpoint)
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def _read(path: Path) -> Checkpoint:
    content = json.loads((path / _JSON).read_text())
    if isinstance(content, dict) and content.get("version", FORMAT) != FORMAT:
        maker = content.get("package_version", "before 0.1.0")
        raise ValueError(f"it was made by version {maker} of edit_compile, this is version {__version__}")
    try:
        metadata = CheckpointMetadata.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{_JSON}: {first_problem(error)}") from None
    if sha256(path / _TENSORS) != metadata.sha256:
        raise ValueError(f"{_TENSORS} does not have the hash that {_JSON} gives")
    return metadata, load_file(path / _TENSORS)


def _remove(checkpoint: Path) -> None:
    (checkpoint / _JSON).unlink()  # without its JSON the folder no longer counts as a checkpoint
    shutil.rmtree(checkpoint)
