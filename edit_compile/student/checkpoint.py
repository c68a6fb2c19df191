"""Loading a converted model: from its base, its plan, and what was added or trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edit_compile.adapters.load_model import load_model
from edit_compile.adapters.pipelines import DENOISERS, denoiser_of, load_diffusers_pipeline, with_denoiser
from edit_compile.errors import CheckpointError, EditCompileError, ModelNotFoundError
from edit_compile.ir.plan import Plan
from edit_compile.passes.pipeline import Passes
from edit_compile.passes.planner import recompile
from edit_compile.student.checkpoint_format import HERE, INDEX, Index, read_index, read_tensors
from edit_compile.student.convert import install, require_plain_forwards
from edit_compile.student.fingerprint import difference, fingerprint
from edit_compile.student.handle import ConvertedModel
from edit_compile.student.lora import install_lora, state_name
from edit_compile.student.save import save
from edit_compile.student.weights import trained_tensors, unshare

__all__ = ["INDEX", "base_of", "load", "load_pipeline", "save"]
_PIPELINE_INDEX = "model_index.json"


def load(folder: str | Path, base: Any = None, *, passes: Passes | None = None) -> nn.Module:
    """Load the converted model of a checkpoint, on its base's device and in its dtype.

    Args:
        folder: as `save` wrote it, or as `save_pretrained` of a converted model or its pipeline did.
        base: the model it was converted from, a pipeline with it, or where that is; default: as the checkpoint says.
        passes: as for `linearize`, where passes of your own had a part.

    Raises:
        CheckpointError: the checkpoint is damaged or of another version, or the base is not the one it was made from.
        ModelNotFoundError: the base is not where the checkpoint says.
    """
    folder = checkpoint_in(Path(folder))
    index = read_index(folder)
    tensors = read_tensors(folder, index)
    model = base if isinstance(base, nn.Module) else denoiser_of(base) or _load_base(folder, index, base)
    differs = difference(index.fingerprint, fingerprint(model.state_dict()))
    if differs:
        raise CheckpointError(f"{folder} was made from another base than this {type(model).__name__}: {differs}; pass base={index.base!r}")
    student = _convert_again(folder, index, model, passes)
    _check_names(folder, tensors, trained_tensors(student))
    student.load_state_dict({state_name(student, name): tensor for name, tensor in tensors.items()}, strict=False)
    student.edit_conversion.base = base_of(folder)
    return student


def _convert_again(folder: Path, index: Index, model: nn.Module, passes: Passes | None) -> ConvertedModel:
    try:
        require_plain_forwards(model)
        student = install(model, recompile(model, Plan.from_json(json.dumps(index.plan)), passes))
        if index.unshared:
            unshare(student, index.unshared)
        if index.lora is not None:
            install_lora(student, index.lora)
    except EditCompileError as error:
        raise CheckpointError(f"{folder / INDEX}: {error}") from error
    return student


def load_pipeline(folder: str | Path, base: Any = None, *, passes: Passes | None = None, **options: Any) -> Any:
    """Load a diffusers pipeline with the converted transformer or UNet.

    Args:
        folder: as for `load`.
        base: a pipeline, or where one is; default: as the checkpoint says.
        passes: as for `load`.
        options: of `DiffusionPipeline.from_pretrained`, like `torch_dtype`.

    Raises:
        CheckpointError: the base is not a pipeline; otherwise as `load`.
    """
    if base is None or isinstance(base, str | Path):
        name = base if base is not None else base_of(folder)
        if name is None:
            raise CheckpointError(f"{folder} does not say where its base pipeline is; pass base=...")
        try:
            base = load_diffusers_pipeline(_pipeline_of(name), **options)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{name} cannot be loaded as a pipeline: {error}; pass base=..., or load the transformer: edit_compile.load"
            ) from error
    return with_denoiser(base, load(folder, denoiser_of(base), passes=passes))


def base_of(folder: str | Path) -> str | None:
    """Tell where a checkpoint says that its base is: a hub id, a folder or a demo model's name.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged or of another version.
    """
    folder = Path(folder)
    base = read_index(checkpoint_in(folder)).base
    return str(folder.resolve()) if base == HERE else base


def checkpoint_in(folder: Path) -> Path:
    """Return the folder itself, or the denoiser's part of a pipeline's folder."""
    if (folder / INDEX).exists() or not (folder / _PIPELINE_INDEX).is_file():
        return folder
    return next((folder / name for name in DENOISERS if (folder / name / INDEX).is_file()), folder)


def _pipeline_of(base: str | Path) -> str:
    """The pipeline that a transformer's folder is part of, or the base as it is."""
    parent = Path(base).parent
    return str(parent if (parent / _PIPELINE_INDEX).is_file() and Path(base).is_dir() else base)


def _load_base(folder: Path, index: Index, base: str | Path | None) -> nn.Module:
    name = base if base is not None else index.base
    if name is None:
        raise CheckpointError(f"{folder} does not say where its base model is; pass base=...")
    try:
        return load_model(str(folder.resolve()) if str(name) == HERE else str(name)).model
    except ModelNotFoundError as error:
        raise CheckpointError(f"the base of {folder}: {error}; pass base=...") from error


def _check_names(folder: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    shapes = [name for name in expected.keys() & found.keys() if expected[name].shape != found[name].shape]
    for problem, names in (("lacks", missing), ("has unknown", extra), ("has wrong shapes for", sorted(shapes))):
        if names:
            raise CheckpointError(f"{folder} {problem} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}; nothing was loaded")
