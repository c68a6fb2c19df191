"""What a run resumes from: folders of one JSON and one safetensors file, each complete or not there at all.

A checkpoint is written beside its place, flushed to the disk, and moved there whole. Of older ones the last few are
kept. Nothing is pickled.
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

from edit_compile.distillation.train.spike_guard import Guard
from edit_compile.errors import DistillError
from edit_compile.files import flush, sha256
from edit_compile.frozen import Frozen

VERSION = 1
_JSON, _TENSORS, _TEMPORARY = "state.json", "state.safetensors", "unfinished-"
log = logging.getLogger(__name__)


class State(Frozen):
    """Where a run stands, next to its tensors.

    Attributes:
        recipe: as resolved.
        phase, step: the number of the phase, and of its steps that are done.
        total: steps done in all phases.
        averages: updates of the moving average.
        numbers: what the optimizer keeps that is no tensor, by name.
        before: the held-out error before training.
        seconds: of training.
        sha256: of the tensors' file.
    """

    version: int = VERSION
    recipe: dict[str, Any]
    phase: int
    step: int
    total: int
    averages: int
    guard: Guard
    numbers: dict[str, int | float]
    before: dict[str, Any]
    seconds: float
    sha256: str = ""


def write_state(folder: Path, state: State, tensors: dict[str, Tensor], keep: int) -> Path:
    """Add a checkpoint to a folder of them, and drop all but the last `keep`.

    Raises:
        DistillError: it cannot be written; says which is the last that was.
    """
    place = place_of(folder, state.total)
    if place in checkpoints(folder) and _is_whole(place):
        return place  # a run that was resumed comes by again, with the same bits
    temporary = folder / f"{_TEMPORARY}{state.total:08d}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / _TENSORS)
        state = state.model_copy(update={"sha256": sha256(temporary / _TENSORS)})
        (temporary / _JSON).write_text(state.model_dump_json(indent=2))
        for path in (temporary / _TENSORS, temporary / _JSON, temporary):
            flush(path)
        if place.exists():
            shutil.rmtree(place)
        os.replace(temporary, place)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DistillError(f"checkpoint {place} cannot be written: {error}; {last_good(folder)}") from error
    for old in checkpoints(folder)[:-keep]:
        _remove(old)
    return place


def place_of(folder: Path, total: int) -> Path:
    """Where the checkpoint after so many steps is."""
    return folder / f"{total:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if (path / _JSON).is_file())


def last_good(folder: Path) -> str:
    """In words, which checkpoint is the last."""
    found = checkpoints(folder)
    return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def read_state(folder: Path) -> tuple[State, dict[str, Tensor]] | None:
    """The newest checkpoint that is whole; damaged ones are named in the log and passed over. None if there is none.

    Raises:
        DistillError: there are some, but all are damaged.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return _read(path)
        except (OSError, ValueError, SafetensorError) as error:
            log.warning("checkpoint %s is damaged (%s): going back to the one before", path, error)
    if found:
        raise DistillError(f"all checkpoints in {folder} are damaged; remove the folder to start again")
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        _read(checkpoint)
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def _read(path: Path) -> tuple[State, dict[str, Tensor]]:
    try:
        state = State.model_validate(json.loads((path / _JSON).read_text()))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{_JSON}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if state.version != VERSION:
        raise ValueError(f"it has version {state.version}, this release reads version {VERSION}")
    if sha256(path / _TENSORS) != state.sha256:
        raise ValueError(f"{_TENSORS} does not have the hash that {_JSON} gives")
    return state, load_file(path / _TENSORS)


def _remove(checkpoint: Path) -> None:
    (checkpoint / _JSON).unlink()  # from here on it is none
    shutil.rmtree(checkpoint)
