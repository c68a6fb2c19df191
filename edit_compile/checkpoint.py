"""Checkpoints hold the difference to the base model: what was added or trained, and the plan it was converted by.

A folder has one JSON file, which names one safetensors file and its hash. Replacing the JSON is the moment a save
takes effect: killed before, the folder still holds the previous checkpoint. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edit_compile.api import TRAINED, linearize, plan_of
from edit_compile.errors import CheckpointError, PlanError
from edit_compile.plans import Plan
from edit_compile.sites import converted_sites

VERSION = 1
INDEX = "edit_compile.json"
FINGERPRINT = "edit_fingerprint"  # of the base, where the student's weights no longer tell
_SAMPLES = 16


class _Index(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: int
    base: str | None
    fingerprint: str
    tensors: str
    sha256: str
    plan: dict[str, Any]
    trained: list[str] = []


def save(student: nn.Module, folder: str | Path, *, base: str | None = None) -> None:
    """Write a converted model's checkpoint. Where several processes train together, all must call it, and the first writes.

    Args:
        folder: made if missing; other files in it are left alone.
        base: where `load` finds the base model: a hub id, a folder or a demo model's name. Default: where the
            student's own base came from, if that is known.

    Raises:
        CheckpointError: the folder is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a checkpoint is a folder")
    tensors = trained_tensors(student)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"edit_compile-{os.getpid()}.tmp"
    try:
        save_file(tensors, temporary)
        digest = _sha256(temporary)
        name = f"edit_compile-{digest[:12]}.safetensors"
        index = _Index(
            version=VERSION,
            base=base if base is not None else student.__dict__.get("edit_base"),
            fingerprint=student.__dict__.get(FINGERPRINT) or fingerprint(student),
            tensors=name,
            sha256=digest,
            plan=json.loads(plan_of(student).to_json()),
            trained=student.__dict__.get(TRAINED, []),
        )
        _flush(temporary)
        os.replace(temporary, folder / name)
        temporary.write_text(index.model_dump_json(indent=2))
        _flush(temporary)
        os.replace(temporary, folder / INDEX)
    finally:
        temporary.unlink(missing_ok=True)
    for old in folder.glob("edit_compile-*.safetensors"):
        if old.name != name:
            old.unlink()


def trained_tensors(student: nn.Module) -> dict[str, Tensor]:
    """The state of the converted sites and what else was trained, by name in the model's state dict, gathered from shards."""
    prefixes, others = tuple(f"{path}." for path in converted_sites(student)), set(student.__dict__.get(TRAINED, ()))
    state = {name: t for name, t in student.state_dict().items() if name.startswith(prefixes) or name in others}
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().contiguous() for name, t in state.items()}


def load(folder: str | Path, base: nn.Module | str | Path | None = None) -> nn.Module:
    """The converted model of a checkpoint, on its base's device and in its dtype.

    Args:
        base: the model it was converted from, or where that is; default: as the checkpoint says.

    Raises:
        CheckpointError: the checkpoint is damaged or of another version, or the base is not the one it was made from.
    """
    folder = Path(folder)
    index = _read_index(folder)
    tensors = _read_tensors(folder, index)
    model = base if isinstance(base, nn.Module) else _load_base(folder, index, base)
    found = fingerprint(model)
    if found != index.fingerprint:
        raise CheckpointError(
            f"{folder} was made from another base than this {type(model).__name__} "
            f"(fingerprint {index.fingerprint[:12]}, not {found[:12]}); pass base={index.base!r}"
        )
    try:
        student = linearize(model, plan=Plan.from_json(json.dumps(index.plan)))
    except PlanError as error:
        raise CheckpointError(f"{folder / INDEX}: {error}") from error
    if index.trained:
        train_beyond_sites(student, index.trained)
        student.__dict__[FINGERPRINT] = index.fingerprint
    _check_names(folder, tensors, trained_tensors(student))
    student.load_state_dict(tensors, strict=False)
    student.__dict__["edit_base"] = index.base
    return student


def train_beyond_sites(student: nn.Module, names: Sequence[str]) -> None:
    """Give the student weights of its own outside the converted sites too. From then on it does not contain its teacher.

    Raises:
        CheckpointError: it has no such parameters.
    """
    parameters = dict(student.named_parameters())
    unknown = [name for name in names if name not in parameters]
    if unknown:
        raise CheckpointError(f"{type(student).__name__} has no {', '.join(unknown[:3])}")
    for name in names:
        parameters[name].data = parameters[name].data.clone()
    student.__dict__[TRAINED] = list(names)


def load_pipeline(folder: str | Path, base: Any = None, **options: Any) -> Any:
    """A diffusers pipeline with the converted transformer.

    Args:
        base: a pipeline, or where one is; default: as the checkpoint says.
        options: of `DiffusionPipeline.from_pretrained`, such as `torch_dtype`.
    """
    from diffusers import DiffusionPipeline

    if base is None:
        base = base_of(folder)
        if base is None:
            raise CheckpointError(f"{folder} does not say where its base pipeline is; pass base=...")
    pipe = base if isinstance(base, DiffusionPipeline) else DiffusionPipeline.from_pretrained(base, **options)
    components = {**pipe.components, "transformer": load(folder, pipe.transformer)}
    return type(pipe)(**components)


def base_of(folder: str | Path) -> str | None:
    """Where a checkpoint says that its base is: a hub id, a folder or a demo model's name."""
    return _read_index(Path(folder)).base


def fingerprint(model: nn.Module) -> str:
    """A hash of the original weights: names, shapes, and a few values of each tensor rounded to bfloat16.

    Equal for a model, for its copies in half precision, and for every student made from it, trained or not.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_original_state(model).items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if tensor.is_floating_point() and not tensor.is_meta and tensor.numel():
            flat = tensor.detach().flatten()
            samples = flat[torch.linspace(0, len(flat) - 1, _SAMPLES, dtype=torch.float64).long().to(flat.device)]
            digest.update(samples.cpu().to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _original_state(model: nn.Module) -> dict[str, Tensor]:
    sites = converted_sites(model)
    prefixes = tuple(f"{path}." for path in sites)
    state = {name: t for name, t in model.state_dict().items() if not name.startswith(prefixes)}
    for path, site in sites.items():
        state |= {f"{path}.{name}": t for name, t in site.edit_teacher.state_dict().items()}
    return state


def _read_index(folder: Path) -> _Index:
    path = folder / INDEX
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no checkpoint: {INDEX} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise CheckpointError(f"{path} has version {version!r}, this release reads version {VERSION}")
    try:
        return _Index.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _read_tensors(folder: Path, index: _Index) -> dict[str, Tensor]:
    if Path(index.tensors).name != index.tensors or index.tensors in ("", ".", ".."):
        raise CheckpointError(f"{folder / INDEX} names {index.tensors!r}, a path outside the folder")
    path = folder / index.tensors
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if _sha256(path) != index.sha256:
        raise CheckpointError(f"{path} is damaged: it does not have the hash that {INDEX} gives")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _load_base(folder: Path, index: _Index, base: str | Path | None) -> nn.Module:
    from edit_compile.adapters.models import load_model

    name = index.base if base is None else str(base)
    if name is None:
        raise CheckpointError(f"{folder} does not say where its base model is; pass base=...")
    return load_model(name).model


def _check_names(folder: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    shapes = [name for name in expected.keys() & found.keys() if expected[name].shape != found[name].shape]
    for problem, names in (("lacks", missing), ("has unknown", extra), ("has wrong shapes for", sorted(shapes))):
        if names:
            raise CheckpointError(f"{folder} {problem} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}; nothing was loaded")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
