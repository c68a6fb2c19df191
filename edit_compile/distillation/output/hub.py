"""Uploads a finished folder to the hub."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from edit_compile.distillation.data.records import SKIPPED_FILE
from edit_compile.distillation.output.data_record import DATA_FILE
from edit_compile.distillation.output.model_card import THIS
from edit_compile.errors import DistillError, first_line
from edit_compile.student.checkpoint_format import INDEX
from edit_compile.words import without_paths

# In the folder itself; and all that begins with a dot. What the data are called, and why some cannot be read, names files of this machine.
_STAY = {"checkpoints", DATA_FILE, SKIPPED_FILE}


def make_repository(repository: str) -> str:
    """Create a private model repository if it does not exist, and make sure that it can be written; returns its address.

    Raises:
        DistillError: the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = str(api.create_repo(repository, private=True, exist_ok=True))  # of an existing one it says nothing of writing
        if "write" in inspect.signature(api.auth_check).parameters:  # not in the client's older versions
            api.auth_check(repository, write=True)
        return address
    except Exception as error:  # without a connection the client raises what its HTTP library does
        raise DistillError(f"{repository} cannot be made or written: {first_line(error).rstrip('.')}; run `hf auth login`") from error


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload a folder to a model repository, created as a private one if it does not exist; returns its address.

    What is uploaded names no path of this machine, and the card names the repository; the folder stays as it is.

    Raises:
        DistillError: the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    address = make_repository(repository)
    files = {path.relative_to(folder).as_posix(): content for path, content in _uploaded(folder, repository)}
    try:
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
        HfApi().create_commit(repository, added, commit_message="Upload a student with edit_compile")
    except Exception as error:
        raise DistillError(
            f"{repository} cannot be uploaded: {first_line(error).rstrip('.')}; run `hf auth login`; the student is in {folder}"
        ) from error
    return address


def _uploaded(folder: Path, repository: str) -> Iterator[tuple[Path, Path | bytes]]:
    """Yield the files of a folder, each with what is uploaded: itself, or what others should see of it."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or parts[0] in _STAY or any(part.startswith(".") for part in parts):
            continue
        if parts == ("README.md",):
            yield path, path.read_bytes().replace(f'"{THIS}"'.encode(), f'"{repository}"'.encode())
        elif len(parts) == 1 and path.suffix in (".json", ".yaml"):
            yield path, _shown(path)
        else:
            yield path, path


def _shown(path: Path) -> bytes:
    """Return plain data without this machine's paths; of a checkpoint's index, whose plan is read again, only the base is one."""
    if path.suffix == ".yaml":
        return yaml.safe_dump(without_paths(yaml.safe_load(path.read_bytes())), sort_keys=False).encode()
    content: Any = json.loads(path.read_bytes())
    shown = content | {"base": without_paths(content["base"])} if path.name == INDEX else without_paths(content)
    return path.read_bytes() if shown == content else json.dumps(shown, indent=2).encode()
