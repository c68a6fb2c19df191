"""Uploads a finished folder to the hub."""

from __future__ import annotations

from pathlib import Path

from edit_compile.adapters.hub_access import first_line
from edit_compile.errors import DistillError


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload a folder to a model repository, created as a private one if it does not exist; returns its address.

    Raises:
        DistillError: the hub refuses or cannot be reached; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, ignore_patterns=["checkpoints/*"])
    except Exception as error:  # without a connection the client raises what its HTTP library does
        raise DistillError(
            f"{repository} cannot be uploaded: {first_line(error)}; run `hf auth login`; the student is in {folder}"
        ) from error
    return str(address)
