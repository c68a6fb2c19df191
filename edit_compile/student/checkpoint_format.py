"""The files of a checkpoint: one JSON file, which names one safetensors file and its hash.

Replacing the JSON is the moment a save takes effect: killed before, the folder still holds the previous checkpoint. LoRA for other
libraries is in a folder in it, which is empty at that moment: it never holds another checkpoint's. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from edit_compile.errors import CheckpointError
from edit_compile.files import claimed, flush, read_small, sha256
from edit_compile.frozen import Frozen, first_problem
from edit_compile.student.fingerprint import TensorPrint
from edit_compile.student.handle import Lora
from edit_compile.student.lora import FILES, FOLDER
from edit_compile.tensor_files import Entry, write_tensors
from edit_compile.version import __version__, made_by_another

FORMAT = 2
INDEX = "edit_compile.json"
WEIGHTS = "edit_compile-*.safetensors"
_LOCK = ".edit_compile.lock"
HERE = "."  # as a base: the checkpoint's own folder, which also holds the original model


class Index(Frozen):
    """What the JSON file says."""

    version: int = FORMAT
    """Of this format."""
    package_version: str = __version__
    """Of the package that wrote it."""
    base: str | None
    """Where the original model is: a hub id, a folder, a demo model's name, or HERE."""
    fingerprint: dict[str, TensorPrint]
    """The original model's."""
    unshared: tuple[str, ...]
    """The names of weights outside the sites that were trained."""
    lora: Lora | None = None
    """The LoRA of Linears outside the sites."""
    plan: dict[str, Any]
    """The plan it was converted by."""
    tensors: str
    """The name of the file with the weights."""
    sha256: str
    """The hash of that file."""


def write(folder: Path, tensors: Mapping[str, Entry], others: dict[str, bytes], **entries: Any) -> None:
    """Write a checkpoint in the place of the one in a folder, at once or not at all.

    Args:
        others: by name, the files of its LoRA for other libraries, some of `lora.FILES`.
        entries: of the index.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a checkpoint is a folder")
    try:
        with claimed(folder / _LOCK, wait=True):  # two savers would each clear the other's files away
            _write(folder, tensors, others, entries)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be written: {error}; what it held before is as it was") from error


def _write(folder: Path, tensors: Mapping[str, Entry], others: dict[str, bytes], entries: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".edit_compile-", dir=folder) as name:
        temporary = Path(name)
        digest = write_tensors(temporary / "tensors", tensors)
        index = Index(tensors=f"edit_compile-{digest[:12]}.safetensors", sha256=digest, **entries)
        (temporary / "index").write_text(index.model_dump_json(), "utf-8")
        for name, content in others.items():
            (temporary / name).write_bytes(content)
            flush(temporary / name)
        _move(temporary / "tensors", folder / index.tensors)
        with _removed([folder / FOLDER / name for name in FILES], temporary):
            _move(temporary / "index", folder / INDEX)
        for name in others:
            (folder / FOLDER).mkdir(exist_ok=True)
            os.replace(temporary / name, folder / FOLDER / name)
    for old in folder.glob(WEIGHTS):
        if old.name != index.tensors:
            old.unlink()
    for left in folder.glob(".edit_compile-*"):  # by a save that was killed
        shutil.rmtree(left, ignore_errors=True)


def _move(file: Path, place: Path) -> None:
    """Move a new file to its place, both flushed to disk."""
    flush(file)
    os.replace(file, place)
    flush(place.parent)


@contextmanager
def _removed(files: list[Path], temporary: Path) -> Iterator[None]:
    """Remove files, if they are there; after an error inside they are back."""
    there = [(file, temporary / f"{file.name}.before") for file in files if file.is_file()]
    for file, kept in there:
        os.replace(file, kept)
    try:
        yield
    except BaseException:
        for file, kept in there:
            os.replace(kept, file)
        raise


def read_index(folder: Path) -> Index:
    """Read what a folder's checkpoint says of itself.

    Raises:
        CheckpointError: there is none, it is damaged, or another version of this package made it.
    """
    path = folder / INDEX
    try:
        content = json.loads(read_small(path))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no checkpoint: {INDEX} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if isinstance(content, dict) and content.get("version") != FORMAT:
        raise CheckpointError(f"{path} was {made_by_another(content.get('package_version'))}; convert the model again")
    try:
        return Index.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {first_problem(error)}") from None


def read_tensors(folder: Path, index: Index) -> dict[str, Tensor]:
    """Read the weights that an index names.

    Raises:
        CheckpointError: the file is missing, outside the folder, or not the one that was written.
    """
    if Path(index.tensors).name != index.tensors or index.tensors in ("", ".", ".."):
        raise CheckpointError(f"{folder / INDEX} names {index.tensors!r}, a path outside the folder")
    path = folder / index.tensors  # may be a link, as in the hub's cache: the hash says whether it is the right file
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is not a regular file")
    try:
        if sha256(path) != index.sha256:
            raise CheckpointError(f"{path} is damaged: it does not have the hash that {INDEX} gives")
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
