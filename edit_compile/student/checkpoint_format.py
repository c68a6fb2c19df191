"""The files of a checkpoint: one JSON file, which names one safetensors file and its hash.

Replacing the JSON is the moment a save takes effect: killed before, the folder still holds the previous checkpoint.
Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from edit_compile.errors import CheckpointError
from edit_compile.files import flush, sha256
from edit_compile.frozen import Frozen, first_problem
from edit_compile.student.fingerprint import TensorPrint
from edit_compile.student.handle import Lora
from edit_compile.version import __version__

FORMAT = 2
INDEX = "edit_compile.json"
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


def write(folder: Path, tensors: dict[str, Tensor], **entries: Any) -> None:
    """Write a checkpoint in the place of the one in a folder, at once or not at all.

    Args:
        entries: of the index.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a checkpoint is a folder")
    try:
        _write(folder, tensors, entries)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be written: {error}; what it held before is as it was") from error


def _write(folder: Path, tensors: dict[str, Tensor], entries: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".edit_compile-", dir=folder) as name:
        temporary = Path(name)
        save_file(tensors, temporary / "tensors")
        digest = sha256(temporary / "tensors")
        index = Index(tensors=f"edit_compile-{digest[:12]}.safetensors", sha256=digest, **entries)
        (temporary / "index").write_text(index.model_dump_json())
        (temporary / "tensors").chmod((temporary / "index").stat().st_mode)  # safetensors lets nobody else read its files
        for file, final in (("tensors", index.tensors), ("index", INDEX)):
            flush(temporary / file)
            os.replace(temporary / file, folder / final)
            flush(folder)
    for old in folder.glob("edit_compile-*.safetensors"):
        if old.name != index.tensors:
            old.unlink()
    for left in folder.glob(".edit_compile-*"):  # by a save that was killed
        shutil.rmtree(left, ignore_errors=True)


def read_index(folder: Path) -> Index:
    """Read what a folder's checkpoint says of itself.

    Raises:
        CheckpointError: there is none, it is damaged, or another version of this package made it.
    """
    path = folder / INDEX
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no checkpoint: {INDEX} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if isinstance(content, dict) and content.get("version") != FORMAT:
        maker = content.get("package_version", "before 0.1.0")
        raise CheckpointError(
            f"{path} was made by version {maker} of edit_compile, which {__version__} cannot read; convert the model again"
        )
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
    try:
        if sha256(path) != index.sha256:
            raise CheckpointError(f"{path} is damaged: it does not have the hash that {INDEX} gives")
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
