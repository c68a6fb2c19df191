"""Uploads a finished folder to the hub."""

from __future__ import annotations

import inspect
from pathlib import Path

from edit_compile.adapters.hub_access import first_line
from edit_compile.distillation.output.model_card import THIS
from edit_compile.errors import DistillError
from edit_compile.files import write_text


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
        raise DistillError(f"{repository} cannot be made or written: {first_line(error)}; run `hf auth login`") from error


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload a folder to a model repository, created as a private one if it does not exist; returns its address.

    The folder's card then names the repository where it named the folder.

    Raises:
        DistillError: the hub refuses or cannot be reached; but for the card, the folder stays as it is.
    """
    from huggingface_hub import HfApi

    address = make_repository(repository)
    card = folder / "README.md"
    if card.is_file():
        write_text(card, card.read_text().replace(f'"{THIS}"', f'"{repository}"'))
    try:
        HfApi().upload_folder(folder_path=folder, repo_id=repository, ignore_patterns=["checkpoints/*", ".*"])
    except Exception as error:
        raise DistillError(
            f"{repository} cannot be uploaded: {first_line(error)}; run `hf auth login`; the student is in {folder}"
        ) from error
    return address
