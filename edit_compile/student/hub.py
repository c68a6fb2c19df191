"""Checkpoints on the hub: which files of a repository are downloaded to the hub's cache, and where they are then."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from edit_compile.adapters.hub_access import hub_files
from edit_compile.adapters.model_names import is_on_hub, without_address
from edit_compile.adapters.pipelines import DENOISERS, PIPELINE_INDEX
from edit_compile.errors import CheckpointError
from edit_compile.student.checkpoint_format import HERE, INDEX, WEIGHTS, read_index

Originals = Literal["none", "model", "pipeline"]

_PLACES = ("", *(f"{name}/" for name in DENOISERS))
_CHECKPOINT = (PIPELINE_INDEX, *(f"{place}{pattern}" for place in _PLACES for pattern in (INDEX, WEIGHTS)))
_PLAIN_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # what a pipeline is read from; nothing pickled, no code
_OF_A_RUN = ("samples/*", "trackers/*", "checkpoints/*")


def checkpoint_folder(name: str | Path, revision: str | None = None, *, originals: Originals = "none") -> Path:
    """Find a checkpoint: the folder of that name, or else the hub's repository, whose checkpoint is downloaded to the hub's cache.

    Args:
        name: a folder, of a pipeline too; a hub id, or the address of its page.
        revision: a branch, a tag or a commit of the repository; default: its newest.
        originals: what is downloaded as well where the repository also holds the original: its model, or its whole pipeline.

    Returns:
        The folder that holds the checkpoint itself: of a pipeline's, its denoiser's part.

    Raises:
        ModelNotFoundError: the hub does not give it; says why.
        CheckpointError: the repository has no checkpoint, or a folder is given with a revision.
    """
    name = without_address(str(name))
    if not is_on_hub(name):
        if revision is not None:
            raise CheckpointError(f"{name} is a folder; only what is on the hub has revisions, not {revision!r}")
        return _part_with_checkpoint(Path(name).expanduser())
    snapshot = hub_files(name, revision, _CHECKPOINT)
    folder = _part_with_checkpoint(snapshot)
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{name} on the hub holds no checkpoint: {INDEX} is missing. edit_compile.load_model reads models that are not converted"
        )
    if originals != "none" and read_index(folder).base == HERE:
        place = "" if folder == snapshot else f"{folder.name}/"
        whole = originals == "pipeline" and (snapshot / PIPELINE_INDEX).is_file()
        wanted = _PLAIN_FILES if whole else (f"{place}*.json", f"{place}*.safetensors")
        hub_files(name, snapshot.name, wanted, left_out=_OF_A_RUN)  # of the same commit
    return folder


def _part_with_checkpoint(folder: Path) -> Path:
    """Return the folder itself, or the denoiser's part of a pipeline's folder."""
    if (folder / INDEX).exists() or not (folder / PIPELINE_INDEX).is_file():
        return folder
    return next((folder / name for name in DENOISERS if (folder / name / INDEX).is_file()), folder)
