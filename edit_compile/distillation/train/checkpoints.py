"""What a run resumes from: folders of one JSON and safetensors files, each complete or not there at all.

Each process writes a file of the shards it has, and any number of processes read their shards from all of the files. A checkpoint is
written beside its place, flushed to disk, and moved there whole when all have written. The last few are kept. Nothing is pickled.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from edit_compile.distillation.processes import gathered, in_all, process
from edit_compile.distillation.train.spike_guard import SpikeGuard
from edit_compile.errors import DistillError
from edit_compile.files import flush, sha256
from edit_compile.frozen import Frozen, first_problem
from edit_compile.tensor_files import Entry, SavedTensors, entries_of, write_tensors
from edit_compile.version import __version__, made_by_another

FORMAT = 4
_JSON, _TEMPORARY = "state.json", "unfinished-"
_NAME = re.compile(r"\d{8,18}")
_FAILURES = (OSError, ValueError, RecursionError, SafetensorError)
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
    files: dict[str, str] = Field(default_factory=dict)
    """The SHA-256 of each file of tensors, by name."""
    checksum: str = ""
    """Of all else that stands here."""


Checkpoint = tuple[CheckpointMetadata, SavedTensors]


class Saving:
    """A checkpoint on its way to the disk. All processes must begin it, and finish it; each writes its shards.

    Attributes:
        place: where the checkpoint will be.
    """

    def __init__(
        self, folder: Path, metadata: CheckpointMetadata, tensors: dict[str, Tensor], keep_last: int, *, in_background: bool = False
    ) -> None:
        """
        Args:
            folder: of checkpoints.
            keep_last: how many checkpoints stay once this one is there.
            in_background: write copies of the tensors while the caller goes on; else `finish` writes.

        Raises:
            DistillError: it cannot be written, by whichever process; names the last that was.
        """
        self.place, self._temporary = checkpoint_path(folder, metadata.total), folder / f"{_TEMPORARY}{metadata.total:08d}"
        self._metadata, self._keep_last = metadata, keep_last
        rank, count = process()
        with self._named_failures():
            in_all(lambda: _begin(self._temporary) if rank == 0 else None, _FAILURES)
        entries = entries_of(tensors, is_first=rank == 0)
        write = functools.partial(_write_shards, self._temporary, rank, count)
        self._writing: Future[dict[str, str]] | None = None
        self._files: Callable[[], dict[str, str]] = functools.partial(write, entries)
        if in_background:
            thread = ThreadPoolExecutor(1, "checkpoint")
            self._writing = thread.submit(write, {name: entry.copied() for name, entry in entries.items()})
            self._files = self._writing.result
            thread.shutdown(wait=False)

    def written(self) -> bool:
        """Tell whether this process's part in the background is done, or has failed."""
        return self._writing is not None and self._writing.done()

    def finish(self) -> None:
        """Move the checkpoint to its place when all have written, and remove all but the last few.

        Raises:
            DistillError: as the constructor.
        """
        is_first = process()[0] == 0
        with self._named_failures():
            written = in_all(self._files, _FAILURES)
            files = {name: digest for part in written for name, digest in part.items()}
            finished = self._metadata.model_copy(update={"files": files})
            in_all(lambda: _finish(self._temporary, self.place, finished, self._keep_last) if is_first else None, _FAILURES)

    @contextmanager
    def _named_failures(self) -> Iterator[None]:
        try:
            yield
        except _FAILURES as error:
            if process()[0] == 0:
                shutil.rmtree(self._temporary, ignore_errors=True)
            raise DistillError(f"checkpoint {self.place} cannot be written: {error}; {describe_last(self.place.parent)}") from error


def _begin(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _write_shards(temporary: Path, rank: int, count: int, entries: dict[str, Entry]) -> dict[str, str]:
    """Write what this process has to write; returns the hash of its file by name, or nothing."""
    if not entries:
        return {}
    path = temporary / ("state.safetensors" if count == 1 else f"state-{rank:05d}-of-{count:05d}.safetensors")
    digest = write_tensors(path, entries)
    flush(path)
    return {path.name: digest}


def _finish(temporary: Path, place: Path, metadata: CheckpointMetadata, keep_last: int) -> None:
    """Write the JSON, move a checkpoint to its place, and remove those that are too many."""
    content = json.loads(metadata.model_dump_json())
    (temporary / _JSON).write_text(json.dumps(content | {"checksum": _checksum(content)}, indent=2))
    for path in (temporary / _JSON, temporary):
        flush(path)
    if place.exists():
        shutil.rmtree(place)
    os.replace(temporary, place)
    flush(place.parent)
    for old in list_checkpoints(place.parent)[:-keep_last]:
        _remove(old)


def checkpoint_path(folder: Path, total: int) -> Path:
    """Return where the checkpoint after a number of steps is."""
    return folder / f"{total:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints of a folder, oldest first; copies of other names are their owner's."""
    named = (path for path in folder.glob("[0-9]*") if _NAME.fullmatch(path.name))
    return sorted((path for path in named if (path / _JSON).is_file()), key=lambda path: int(path.name))


def describe_last(folder: Path) -> str:
    """Say which checkpoint is the last."""
    found = list_checkpoints(folder)
    return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def load_newest(folder: Path) -> Checkpoint | None:
    """Open the newest checkpoint that is not damaged; damaged ones are logged and passed over. None if there is no checkpoint.

    All processes must call this, and get the same: each verifies some of the files.

    Raises:
        DistillError: all are damaged, or one that may be sound cannot be used: it was made by another version, or cannot be read now.
    """
    reasons = []
    found: list[Path] = gathered([list_checkpoints(folder)])[0]
    for path in reversed(found):
        opened: list[Checkpoint] = []
        problems = [problem for problem in gathered([_problem(path, opened)]) if problem is not None]
        if not problems:
            return opened[0]
        damaged, reason = min(problems)
        if not damaged:
            raise DistillError(f"{path}: {reason}")
        if process()[0] == 0:
            log.warning("checkpoint %s cannot be used: %s; trying the one before", path, reason)
        reasons.append(f"{path.name}: {reason}")
    if reasons:
        raise DistillError(f"no checkpoint in {folder} can be used: {reasons[0]}; remove the folder to start again")
    return None


def _problem(path: Path, opened: list[Checkpoint]) -> tuple[bool, str] | None:
    """Try to open a checkpoint; returns whether it is damaged, and why it cannot be used, or adds it to a list."""
    try:
        _open(path, opened)
    except _AnotherVersion as error:
        return False, f"{error}; continue with that version, or choose another folder"
    except (FileNotFoundError, ValueError, RecursionError, SafetensorError) as error:
        return True, str(error)
    except OSError as error:
        return False, f"it cannot be read: {error}; once it can be, continue, or move it away to continue from the one before"
    return None


class _AnotherVersion(Exception):
    """Another version of this package made a checkpoint, in another format."""


def _open(path: Path, opened: list[Checkpoint]) -> None:
    """Check a checkpoint's JSON and this process's share of its files, and add it to a list."""
    content = json.loads((path / _JSON).read_bytes())
    if isinstance(content, dict) and content.get("version", FORMAT) != FORMAT:
        raise _AnotherVersion(f"it was {made_by_another(content.get('package_version'))}")
    try:
        metadata = CheckpointMetadata.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{_JSON}: {first_problem(error)}") from None
    if metadata.checksum != _checksum(content):
        raise ValueError(f"{_JSON} does not have the checksum that it gives: it was changed")
    rank, count = process()
    if any(Path(name).name != name for name in metadata.files):
        raise ValueError(f"{_JSON} names files outside the checkpoint")
    for name in sorted(metadata.files)[rank::count]:
        if sha256(path / name) != metadata.files[name]:
            raise ValueError(f"{name} does not have the hash that {_JSON} gives")
    opened.append((metadata, SavedTensors(path / name for name in metadata.files)))


def _checksum(content: dict[str, Any]) -> str:
    """Hash what a checkpoint's JSON says, whatever fields a release has."""
    said = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def remove_after(folder: Path, total: int) -> None:
    """Remove the checkpoints after a number of steps: a run that resumes from there could not use them, and would keep them."""
    for path in list_checkpoints(folder):
        if int(path.name) > total:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    (checkpoint / _JSON).unlink()  # without its JSON the folder no longer counts as a checkpoint
    shutil.rmtree(checkpoint)
