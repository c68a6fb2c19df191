"""Loading a converted model: from its base, its plan, and what was added or trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edit_compile.adapters.hub_access import only_cached
from edit_compile.adapters.load_model import load_model
from edit_compile.adapters.model_names import is_on_hub
from edit_compile.adapters.pipelines import (
    PIPELINE_INDEX,
    denoiser_of,
    load_diffusers_pipeline,
    notice_heard,
    take_notice_off,
    with_denoiser,
)
from edit_compile.adapters.stored_dtype import stored_dtype
from edit_compile.errors import CheckpointError, EditCompileError, ModelNotFoundError, RewriteError, some_of
from edit_compile.ir.plan import Plan
from edit_compile.passes.pipeline import Passes
from edit_compile.passes.planner import recompile
from edit_compile.student.checkpoint_format import HERE, INDEX, Index, read_index, read_tensors
from edit_compile.student.convert import install, require_plain
from edit_compile.student.fingerprint import difference, fingerprint
from edit_compile.student.handle import ConvertedModel
from edit_compile.student.hub import checkpoint_folder
from edit_compile.student.lora import install_lora, state_name
from edit_compile.student.save import save
from edit_compile.student.weights import check_finite, own_weights, trained_tensors

__all__ = ["INDEX", "base_of", "load", "load_pipeline", "save"]


def load(folder: str | Path, base: Any = None, *, revision: str | None = None, passes: Passes | None = None) -> nn.Module:
    """Load the converted model of a checkpoint, on its base's device and in its dtype.

    Args:
        folder: as `save` wrote it, or as `save_pretrained` of a converted model or its pipeline did; or the hub id of a repository
            that holds the same. A folder of that name comes first.
        base: the model it was converted from, a pipeline with it, or where that is; default: as the checkpoint says.
        revision: of the repository: a branch, a tag or a commit.
        passes: as for `linearize`, where passes of your own had a part.

    Raises:
        CheckpointError: the checkpoint is damaged or of another version, or the base is not the one it was made from.
        ModelNotFoundError: the base is not where the checkpoint says, or the hub does not give the checkpoint.
    """
    return _load(folder, base, revision, passes)


def load_for_shards(folder: str | Path) -> nn.Module:
    """Do what `load` does, without copying a weight: what is mapped from files stays there, in the files' dtype, until each process takes
    its shards of it.

    Nothing may be written to the model before that.

    Raises:
        CheckpointError, ModelNotFoundError: as `load`.
    """
    return _load(folder, read_only=True)


def _load(
    folder: str | Path, base: Any = None, revision: str | None = None, passes: Passes | None = None, *, read_only: bool = False
) -> nn.Module:
    folder = checkpoint_folder(folder, revision, originals="model" if base is None else "none")
    index = read_index(folder)
    tensors = read_tensors(folder, index)
    model = base if isinstance(base, nn.Module) else denoiser_of(base) or _load_base(folder, index, base, as_stored=read_only)
    take_notice_off(model)
    require_plain(model)
    differs = difference(index.fingerprint, fingerprint(model.state_dict()))
    if differs:
        right = "the model that it was made from" if index.base is None else f"base={index.base!r}"
        raise CheckpointError(f"{folder} was made from another base than this {type(model).__name__}: {differs}; pass {right}")
    student = _convert_again(folder, index, model, passes, read_only=read_only)
    _check(folder, tensors, trained_tensors(student))
    student.load_state_dict({state_name(student, name): tensor for name, tensor in tensors.items()}, strict=False, assign=read_only)
    student.edit_conversion.base = base_of(folder)
    return student


def _convert_again(folder: Path, index: Index, model: nn.Module, passes: Passes | None, *, read_only: bool) -> ConvertedModel:
    try:
        student = install(model, recompile(model, Plan.from_json(json.dumps(index.plan)), passes), read_only=read_only)
        if index.unshared:
            own_weights(student, index.unshared, read_only=read_only)
        if index.lora is not None:
            install_lora(student, index.lora)
    except EditCompileError as error:
        raise CheckpointError(f"{folder / INDEX}: {error}") from error
    return student


def load_pipeline(
    folder: str | Path, base: Any = None, *, revision: str | None = None, passes: Passes | None = None, **options: Any
) -> Any:
    """Load a diffusers pipeline with the converted transformer or UNet.

    Args:
        folder: as for `load`.
        base: a pipeline, or where one is; default: as the checkpoint says.
        revision, passes: as for `load`.
        options: of `DiffusionPipeline.from_pretrained`, like `torch_dtype`.

    Raises:
        CheckpointError: the base is not a pipeline; otherwise as `load`.
    """
    folder = checkpoint_folder(folder, revision, originals="pipeline" if base is None else "none")
    if base is None or isinstance(base, str | Path):
        name = str(base) if base is not None else base_of(folder)
        if name is None:
            raise CheckpointError(f"{folder} does not say where its base pipeline is; pass base=...")
        try:
            with nullcontext() if base is not None else as_checkpoint_says(folder, name), notice_heard():
                base = load_diffusers_pipeline(_pipeline_of(name), **options)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{name} cannot be loaded as a pipeline: {error}; pass base=..., or load the transformer: edit_compile.load"
            ) from error
    if isinstance(base, nn.Module) or (denoiser := denoiser_of(base)) is None:
        raise CheckpointError(f"a {type(base).__name__} is not a pipeline with a transformer or a UNet; without one: edit_compile.load")
    return with_denoiser(base, load(folder, denoiser, passes=passes))


def base_of(folder: str | Path) -> str | None:
    """Tell where a checkpoint says that its base is: a hub id, a folder or a demo model's name.

    Args:
        folder: as for `load`.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged or of another version.
        ModelNotFoundError: the hub does not give it.
    """
    found = checkpoint_folder(folder)
    base = read_index(found).base
    return str((Path(folder) if Path(folder).is_dir() else found).resolve()) if base == HERE else base


@contextmanager
def as_checkpoint_says(folder: str | Path, name: str) -> Iterator[None]:
    """Load inside what a checkpoint names as its base: it may come from anybody, so that nothing is downloaded.

    Raises:
        CheckpointError: the base is of the hub, and was not downloaded before.
    """
    try:
        with only_cached():
            yield
    except ModelNotFoundError:
        if not is_on_hub(name):
            raise
        raise CheckpointError(
            f"{folder} was made from {name}, which was not downloaded before, and is not only because a checkpoint says so: "
            f"pass base={name!r}, or download it yourself"
        ) from None


def _pipeline_of(base: str | Path) -> str:
    """Return the pipeline that a transformer's folder is part of, or the base as it is."""
    parent = Path(base).parent
    return str(parent if (parent / PIPELINE_INDEX).is_file() and Path(base).is_dir() else base)


def _load_base(folder: Path, index: Index, base: str | Path | None, *, as_stored: bool) -> nn.Module:
    name = str(base) if base is not None else index.base
    if name is None:
        raise CheckpointError(f"{folder} does not say where its base model is; pass base=...")
    try:
        with nullcontext() if base is not None else as_checkpoint_says(folder, name), notice_heard():
            name = str(folder.resolve()) if name == HERE else name
            return load_model(name, dtype=stored_dtype(load_model(name, structure_only=True)) if as_stored else None).model
    except ModelNotFoundError as error:
        raise CheckpointError(f"the base of {folder}: {error}; pass base=...") from error


def _check(folder: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Refuse weights of other names, shapes or kinds of numbers than the model's, and those that are no numbers."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    both = sorted(expected.keys() & found.keys())
    shapes = [name for name in both if expected[name].shape != found[name].shape]
    kinds = [name for name in both if expected[name].is_floating_point() != found[name].is_floating_point()]
    problems = (
        ("lacks", missing),
        ("has unknown", extra),
        ("has wrong shapes for", shapes),
        ("has other numbers than floating-point for", kinds),
    )
    for problem, names in problems:
        if names:
            raise CheckpointError(f"{folder} {problem} {some_of(names)}; nothing was loaded")
    try:
        check_finite(found.items(), f"{folder}: nothing was loaded")
    except RewriteError as error:
        raise CheckpointError(str(error)) from None
