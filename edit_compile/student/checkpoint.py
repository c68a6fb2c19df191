"""Checkpoints hold the difference to the base model: what was added or trained, and the plan it was converted by.

A folder has one JSON file, which names one safetensors file and its hash. Replacing the JSON is the moment a save
takes effect: killed before, the folder still holds the previous checkpoint. Nothing is pickled.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edit_compile.adapters.pipelines import load_diffusers_pipeline, origin_of, with_transformer
from edit_compile.errors import CheckpointError, EditCompileError, ModelNotFoundError
from edit_compile.files import flush, sha256
from edit_compile.ir.plan import Plan
from edit_compile.passes.site_graph import ADDED
from edit_compile.student.convert import FINGERPRINT, PLAN
from edit_compile.student.fingerprint import TensorPrint, difference, fingerprint
from edit_compile.student.grid import converted_model
from edit_compile.student.site import converted_sites, is_sharded
from edit_compile.student.weights import check_finite, original_state, originals, unshare

VERSION = 1
INDEX = "edit_compile.json"
PIPELINE_INDEX = "model_index.json"
HERE = "."  # as a base: the checkpoint's own folder, which also holds the original model


class _Index(BaseModel):
    """`unshared` names what is trained outside the sites; `base` is a hub id, a folder, a demo model's name or HERE."""

    model_config = ConfigDict(extra="forbid")

    version: int
    base: str | None
    fingerprint: dict[str, TensorPrint]
    tensors: str
    sha256: str
    unshared: tuple[str, ...]
    plan: dict[str, Any]


def save(student: Any, folder: str | Path, *, base: str | Path | None = None) -> None:
    """Write a converted model's checkpoint. Under FSDP every process has to call it; the first one writes.

    Args:
        student: a converted model, or a pipeline with one.
        folder: made if missing; other files in it are left alone.
        base: where `load` finds the base model: a hub id, a folder or a demo model's name. Default: where the pipeline,
            or the student's own base, was loaded from, if that is known.

    Raises:
        CheckpointError: the folder cannot be written; the model holds what a checkpoint cannot (adapters), weights that
            were trained though they are shared with the original, or none at all (meta device).
        RewriteError: a weight holds NaN or infinity; says which.
    """
    model = converted_model(student)
    _check_structure(model)
    writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    tensors = _gathered(model, keep=writes)
    if not writes:
        return
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a checkpoint is a folder")
    entries = {
        "version": VERSION,
        "base": _name_of(base or origin_of(student) or model.__dict__.get("edit_base") or origin_of(model)),
        "fingerprint": model.__dict__[FINGERPRINT],
        "unshared": tuple(original.name for original in originals(model)),
        "plan": json.loads(model.__dict__[PLAN].to_json()),
    }
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
        index = _Index(tensors=f"edit_compile-{digest[:12]}.safetensors", sha256=digest, **entries)
        (temporary / "index").write_text(index.model_dump_json())
        for file, final in (("tensors", index.tensors), ("index", INDEX)):
            flush(temporary / file)
            os.replace(temporary / file, folder / final)
            flush(folder)
    for old in folder.glob("edit_compile-*.safetensors"):
        if old.name != index.tensors:
            old.unlink()
    for left in folder.glob(".edit_compile-*"):  # by a save that was killed
        shutil.rmtree(left, ignore_errors=True)


def trained_tensors(student: nn.Module) -> dict[str, Tensor]:
    """What is the student's own: the state of the converted sites and unshared weights, by name in the model's state dict."""
    prefixes = tuple(f"{path}." for path in converted_sites(student))
    unshared = {original.name for original in originals(student)}
    return {name: t.detach() for name, t in student.state_dict().items() if name.startswith(prefixes) or name in unshared}


def _check_structure(student: nn.Module) -> None:
    """The checkpoint is rebuilt from base and plan: it can hold their weights and no others."""
    known, added = student.__dict__[FINGERPRINT], tuple(f"{path}.{ADDED}." for path in converted_sites(student))
    found = {name for name in student.state_dict() if not name.startswith(added)}
    if strange := sorted(found ^ known.keys()):
        raise CheckpointError(
            f"{', '.join(strange[:3])}{' ...' if len(strange) > 3 else ''}: not as it was at conversion. Adapters (LoRA) are saved by "
            "their own library; unload or fuse them before edit_compile.save"
        )


def _gathered(student: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """What is the student's own, whole and on the CPU: one tensor at a time, kept or not."""
    tensors = trained_tensors(student)
    _check_values(student, tensors)
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
        check_finite([(name, whole)], "nothing was saved")
        if keep:  # tied weights, too, get memory of their own
            found[name] = whole.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return found


def _check_values(student: nn.Module, tensors: dict[str, Tensor]) -> None:
    offloaded = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
    if offloaded:
        raise CheckpointError(f"{offloaded} has no values (meta device); undo offloading first, pipe.remove_all_hooks() for a pipeline")
    unsaved = [n for n, p in student.named_parameters() if p.requires_grad and n not in tensors]
    if unsaved:
        raise CheckpointError(
            f"{unsaved[0]}{f' and {len(unsaved) - 1} more' if len(unsaved) > 1 else ''} can be trained, but shares its memory with the "
            "original model, which training would change too; call edit_compile.unshare(student) before training, or freeze it"
        )


def _name_of(base: str | Path | None) -> str | None:
    """A base that is a folder by its absolute path."""
    if base is None or str(base) == HERE or str(base).startswith(("demo/", "timm/")) or not Path(base).is_dir():
        return None if base is None else str(base)
    return str(Path(base).resolve())


def load(folder: str | Path, base: Any = None) -> nn.Module:
    """The converted model of a checkpoint, on its base's device and in its dtype.

    Args:
        folder: as `save` wrote it, or as `save_pretrained` of a converted model or its pipeline did.
        base: the model it was converted from, a pipeline with it, or where that is; default: as the checkpoint says.

    Raises:
        CheckpointError: the checkpoint is damaged or of another version, or the base is not the one it was made from.
        ModelNotFoundError: the base is not where the checkpoint says.
    """
    folder = _checkpoint_in(Path(folder))
    index = _read_index(folder)
    tensors = _read_tensors(folder, index)
    model = base if isinstance(base, nn.Module) else getattr(base, "transformer", None) or _load_base(folder, index, base)
    differs = difference(index.fingerprint, fingerprint(model.state_dict()))
    if differs:
        raise CheckpointError(f"{folder} was made from another base than this {type(model).__name__}: {differs}; pass base={index.base!r}")
    try:
        from edit_compile.api import linearize

        student = linearize(model, plan=Plan.from_json(json.dumps(index.plan)))
        if index.unshared:
            unshare(student, index.unshared)
    except EditCompileError as error:
        raise CheckpointError(f"{folder / INDEX}: {error}") from error
    _check_names(folder, tensors, trained_tensors(student))
    student.load_state_dict(tensors, strict=False)
    student.__dict__["edit_base"] = base_of(folder)
    return student


def load_pipeline(folder: str | Path, base: Any = None, **options: Any) -> Any:
    """A diffusers pipeline with the converted transformer.

    Args:
        folder: as for `load`.
        base: a pipeline, or where one is; default: as the checkpoint says.
        options: of `DiffusionPipeline.from_pretrained`, such as `torch_dtype`.

    Raises:
        CheckpointError: the base is no pipeline; otherwise as `load`.
    """
    if base is None or isinstance(base, str | Path):
        name = base if base is not None else base_of(folder)
        if name is None:
            raise CheckpointError(f"{folder} does not say where its base pipeline is; pass base=...")
        try:
            base = load_diffusers_pipeline(_pipeline_of(name), **options)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{name} is no pipeline that can be loaded: {error}; pass base=..., or load the transformer: load"
            ) from error
    return with_transformer(base, load(folder, base.transformer))


def base_of(folder: str | Path) -> str | None:
    """Where a checkpoint says that its base is: a hub id, a folder or a demo model's name."""
    folder = Path(folder)
    inner = _checkpoint_in(folder)
    base = _read_index(inner).base
    return str(folder.resolve()) if base == HERE else base


def _checkpoint_in(folder: Path) -> Path:
    """The folder itself, or the transformer's part of a pipeline's folder."""
    inner = folder / "transformer"
    return inner if not (folder / INDEX).exists() and (folder / PIPELINE_INDEX).is_file() and (inner / INDEX).is_file() else folder


def _pipeline_of(base: str | Path) -> str:
    """The pipeline that a transformer's folder is part of, or the base as it is."""
    parent = Path(base).parent
    return str(parent if (parent / PIPELINE_INDEX).is_file() and Path(base).is_dir() else base)


def _read_index(folder: Path) -> _Index:
    path = folder / INDEX
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no checkpoint: {INDEX} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
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
    path = folder / index.tensors  # may be a link, as in the hub's cache: the hash says whether it is the right file
    try:
        if sha256(path) != index.sha256:
            raise CheckpointError(f"{path} is damaged: it does not have the hash that {INDEX} gives")
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _load_base(folder: Path, index: _Index, base: str | Path | None) -> nn.Module:
    from edit_compile.adapters.load_model import load_model

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


def attach_save_pretrained(student: nn.Module) -> nn.Module:
    """Let `student.save_pretrained(folder)`, and so the `save_pretrained` of its pipeline, write a folder that holds both: the
    original model, as diffusers reads it, and beside it the checkpoint, as `edit_compile.load` reads it.
    """
    own = getattr(type(student), "save_pretrained", None)
    if own is None:
        return student

    @functools.wraps(own)
    def save_pretrained(model: nn.Module, save_directory: Any, *args: Any, push_to_hub: bool = False, **options: Any) -> None:
        if push_to_hub:
            raise CheckpointError("a converted model is pushed in two steps: save it to a folder, then `hf upload` the folder")
        original = original_state(model)

        def replace(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
            state.clear()
            state.update(original)

        hook = model.register_state_dict_post_hook(replace)
        try:
            own(model, save_directory, *args, **options)
        finally:
            hook.remove()
        save(model, Path(save_directory), base=".")

    student.__dict__["save_pretrained"] = types.MethodType(save_pretrained, student)
    return student
