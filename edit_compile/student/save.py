"""Saving a converted model: what was added or trained, and the plan it was converted by."""

from __future__ import annotations

import functools
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from edit_compile.adapters.pipelines import add_notice, origin_of
from edit_compile.errors import CheckpointError, some_of
from edit_compile.files import write_text
from edit_compile.passes.site_graph import ADDED
from edit_compile.student.checkpoint_format import HERE, write
from edit_compile.student.handle import ConvertedModel, unwrap
from edit_compile.student.lora import files_for_others, lora_names, plain_name, without_lora
from edit_compile.student.site import converted_sites
from edit_compile.student.standalone import write_standalone
from edit_compile.student.weights import changes_of, check_finite, is_on_disk, original_state, shared_tensors, trained_tensors
from edit_compile.tensor_files import Entry, in_order
from edit_compile.torch_internals import is_quantized, is_sharded

_CARD = """\
---
library_name: edit_compile
---

Converted by edit_compile. `edit_compile.load` (or `load_pipeline`) reads this folder as the converted model; diffusers reads it as the
original one, with its original attention.
"""


def save(student: Any, folder: str | Path, *, base: str | Path | None = None, standalone: bool = False) -> None:
    """Write a converted model's checkpoint. Under FSDP every process has to call it; the first one writes, one tensor at a time.

    Args:
        student: a converted model, or what holds one: a pipeline, DDP, torch.compile.
        folder: made if missing; other files in it are left alone. Weights outside the sites that were written to are saved too.
        base: where `load` finds the base model: a hub id, a folder or a demo model's name. Default: where the pipeline,
            or the student's own base, was loaded from, if that is known.
        standalone: write the whole model and its code as well, of a pipeline the whole pipeline: diffusers draws with it where this
            package is not, `from_pretrained(folder, trust_remote_code=True)`.

    Raises:
        CheckpointError: the folder cannot be written; the model holds what a checkpoint cannot (adapters, quantized weights, written
            buffers), sharded weights that are trained and the original's, or none at all (meta device); it cannot stand alone.
        RewriteError: a weight holds NaN or infinity; says which.
    """
    model = unwrap(student)
    _check_names(model)
    _check_values(model)
    changed = _changed(model)
    writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    tensors, conversion = trained_tensors(model, changed), model.edit_conversion
    check_finite(((name, tensor) for name, tensor in tensors.items() if not is_sharded(tensor)), "nothing was saved")
    if standalone:
        write_standalone(student, Path(folder))
    adapters = {name: _whole(name, tensors[name]) for name in sorted(lora_names(model))}  # in every process alike
    left = in_order({name: Entry(t.dtype, tuple(t.shape), partial(_whole, name, t)) for name, t in tensors.items()})
    entries = {name: entry._replace(values=partial(_take, left, name)) for name, entry in left.items()}
    try:
        if writes:
            write(
                Path(folder),
                entries,
                files_for_others(conversion.lora, adapters) if conversion.lora is not None else {},
                base=_name_of(base or origin_of(student) or conversion.base),
                fingerprint=conversion.fingerprint,
                unshared=(*conversion.originals, *changed),
                lora=conversion.lora,
                plan=json.loads(conversion.plan.to_json()),
            )
    except CheckpointError:
        _gather(left)  # the others wait for it
        raise
    _gather(left)


def _check_names(student: ConvertedModel) -> None:
    """Refuse other weights than those of base and plan, from which the checkpoint is rebuilt."""
    known, added = student.edit_conversion.fingerprint, tuple(f"{path}.{ADDED}." for path in converted_sites(student))
    found = {name for name in without_lora(student, student.state_dict()) if not name.startswith(added)}
    if strange := sorted(found ^ known.keys()):
        raise CheckpointError(
            f"{some_of(strange)}: not as it was at conversion. Adapters (LoRA) that other "
            "libraries added are saved by them; unload or fuse them before edit_compile.save"
        )


def _check_values(student: ConvertedModel) -> None:
    """Refuse weights whose values are not here, or that are quantized."""
    tensors = trained_tensors(student)
    offloaded = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
    if offloaded:
        raise CheckpointError(f"{offloaded} has no values (meta device); undo offloading first, pipe.remove_all_hooks() for a pipeline")
    if any(map(is_on_disk, student.modules())):
        raise CheckpointError("the weights are offloaded to disk: save before enabling group offloading, or without offload_to_disk_path")
    quantized = next((name for name, tensor in tensors.items() if is_quantized(tensor)), None)
    if quantized:
        raise CheckpointError(
            f"{quantized} is quantized ({type(tensors[quantized]).__name__}): save the student before that, and quantize what is loaded"
        )
    unsaved = [n for n, p in student.named_parameters() if p.requires_grad and is_sharded(p) and plain_name(student, n) not in tensors]
    if unsaved:
        raise CheckpointError(
            f"{some_of(unsaved)} can be trained, but are the original model's; call edit_compile.unshare(student) before they are sharded "
            "and trained, or freeze them"
        )


def _changed(student: ConvertedModel) -> list[str]:
    """Name the weights that are to be saved because they are not the base's any more, though nothing was unshared."""
    tensors = shared_tensors(student)  # of which quantized ones, outside of the sites, are made of the base again
    changed = [name for name in changes_of(student, thoroughly=True).written if not is_quantized(tensors[name])]
    named = student.named_parameters(remove_duplicate=False)
    saved = {plain_name(student, name) for name, parameter in named if parameter.is_floating_point()}
    if lost := [name for name in changed if name not in saved]:
        raise CheckpointError(f"{some_of(lost)} was written to, and is a buffer: a checkpoint holds parameters only; write its values back")
    return changed


def _take(left: dict[str, Entry], name: str) -> Tensor:
    return left.pop(name).values()


def _gather(left: dict[str, Entry]) -> None:
    """Take part in gathering what is left."""
    for name in list(left):
        _take(left, name)


def _whole(name: str, tensor: Tensor) -> Tensor:
    """Gather a tensor from its shards, if it has any, and look at its values."""
    if not is_sharded(tensor):
        return tensor
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    check_finite([(name, full)], "nothing was saved")
    return full


def _name_of(base: str | Path | None) -> str | None:
    """Name a base that is a folder by its absolute path, any other as it is."""
    if base is None or str(base) == HERE or str(base).startswith(("demo/", "timm/")) or not Path(base).is_dir():
        return None if base is None else str(base)
    return str(Path(base).resolve())


def saving_both(original: type[nn.Module]) -> dict[str, Any]:
    """Make the `save_pretrained` of a converted model's class, if the original's has one; the names that the class gets.

    It writes a folder that holds both: the original model, as diffusers reads it, and beside it the checkpoint, as
    `edit_compile.load` reads it. A pipeline's `save_pretrained` calls it.
    """
    write_original = getattr(original, "save_pretrained", None)
    if write_original is None:
        return {}

    @functools.wraps(write_original)
    def save_pretrained(model: ConvertedModel, save_directory: Any, *args: Any, push_to_hub: bool = False, **options: Any) -> None:
        if push_to_hub:
            raise CheckpointError("a converted model is pushed in two steps: save it to a folder, then `hf upload` the folder")
        _check_values(model)
        if changed := _changed(model):
            raise CheckpointError(
                f"{some_of(changed)} was written to, so that the original model, which is part of this folder, is not here any more; write "
                "the difference alone: edit_compile.save(model, folder, base=...)"
            )
        state_of_original = original_state(model)

        def replace(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
            state.clear()
            state.update(state_of_original)

        hook = model.register_state_dict_post_hook(replace)  # type: ignore[no-untyped-call]
        try:
            write_original(model, save_directory, *args, **options)
        finally:
            hook.remove()
        add_notice(Path(save_directory) / "config.json")
        save(model, Path(save_directory), base=HERE)
        card = Path(save_directory) / "README.md"
        if not card.exists():
            write_text(card, _CARD)

    return {"save_pretrained": save_pretrained}
