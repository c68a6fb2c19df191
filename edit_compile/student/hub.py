"""Where a converted model is: a folder, or a repository of the hub, of which as much is downloaded as is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from edit_compile.adapters.hub_access import hub_files
from edit_compile.adapters.model_names import hub_id, is_on_hub, with_revision, without_address
from edit_compile.adapters.pipelines import DENOISERS, PIPELINE_INDEX
from edit_compile.errors import CheckpointError
from edit_compile.student.checkpoint_format import HERE, INDEX, WEIGHTS, read_index

Originals = Literal["none", "model", "pipeline"]

_PLACES = ("", *(f"{name}/" for name in DENOISERS))
_INDEXES = (PIPELINE_INDEX, *(f"{place}{INDEX}" for place in _PLACES))
_WEIGHTS = tuple(f"{place}{WEIGHTS}" for place in _PLACES)
_PLAIN_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # what a pipeline is read from; nothing pickled, no code
_OF_A_RUN = ("samples/*", "trackers/*", "checkpoints/*")


def find_checkpoint(name: str | Path) -> Path | None:
    """Find the folder that holds a checkpoint's index, of a pipeline's checkpoint its denoiser's part; None if there is no checkpoint.

    Args:
        name: a folder, a model's name, or the hub id of a repository, whose index is downloaded to the hub's cache.

    Raises:
        ModelNotFoundError: the hub does not give it; says why.
    """
    name = with_revision(str(name), None)
    on_hub = is_on_hub(name) and not name.startswith("timm/")
    folder = _part_with_checkpoint(hub_files(name, _INDEXES) if on_hub else Path(name).expanduser())
    return folder if (folder / INDEX).is_file() else None


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
        CheckpointError: the repository has no checkpoint.
        ConfigError: a revision of a folder.
    """
    name = with_revision(str(name), revision)
    if not is_on_hub(name):
        return _part_with_checkpoint(Path(name).expanduser())
    snapshot = hub_files(name, (*_INDEXES, *_WEIGHTS))
    folder = _part_with_checkpoint(snapshot)
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{name} on the hub holds no checkpoint: {INDEX} is missing. edit_compile.load_model reads models that are not converted"
        )
    if originals != "none" and read_index(folder).base == HERE:
        place = "" if folder == snapshot else f"{folder.name}/"
        whole = originals == "pipeline" and (snapshot / PIPELINE_INDEX).is_file()
        wanted = _PLAIN_FILES if whole else (f"{place}*.json", f"{place}*.safetensors")
        hub_files(f"{hub_id(name)[0]}@{snapshot.name}", wanted, left_out=_OF_A_RUN)  # of the same commit
    return folder


def run_folder(name: str | Path, downloads: Path | None = None) -> Path:
    """Return the folder of a finished run, given it or the hub id of a repository that it was uploaded to.

    Args:
        downloads: where a repository is downloaded to, into a folder of its name, which is written to like any; default: the hub's cache.

    Raises:
        ModelNotFoundError: the hub does not give it; says why.
    """
    name = without_address(str(name))
    if not is_on_hub(name):
        return Path(name).expanduser()
    return hub_files(name, left_out=("trackers/*",), folder=None if downloads is None else downloads / name)


def _part_with_checkpoint(folder: Path) -> Path:
    """Return the folder itself, or the denoiser's part of a pipeline's folder."""
    if (folder / INDEX).exists() or not (folder / PIPELINE_INDEX).is_file():
        return folder
    return next((folder / name for name in DENOISERS if (folder / name / INDEX).is_file()), folder)
