"""Saving a converted model: what was added or trained, and the plan it was converted by."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from edit_compile.adapters.pipelines import origin_of
from edit_compile.errors import CheckpointError
from edit_compile.passes.site_graph import ADDED
from edit_compile.student.checkpoint_format import HERE, write
from edit_compile.student.handle import ConvertedModel, unwrap
from edit_compile.student.lora import plain_name, without_lora, write_for_others
from edit_compile.student.site import converted_sites
from edit_compile.student.weights import check_finite, original_state, trained_tensors
from edit_compile.torch_internals import is_sharded

_CARD = """\
---
library_name: edit_compile
---

Converted by edit_compile. `edit_compile.load` (or `load_pipeline`) reads this folder as the converted model; diffusers reads it as the
original one, with its original attention.
"""


def save(student: Any, folder: str | Path, *, base: str | Path | None = None) -> None:
    """Write a converted model's checkpoint. Under FSDP every process has to call it; the first one writes.

    Args:
        student: a converted model, or what holds one: a pipeline, DDP, torch.compile.
        folder: made if missing; other files in it are left alone.
        base: where `load` finds the base model: a hub id, a folder or a demo model's name. Default: where the pipeline,
            or the student's own base, was loaded from, if that is known.

    Raises:
        CheckpointError: the folder cannot be written; the model holds what a checkpoint cannot (adapters), weights that
            were trained though they are shared with the original, or none at all (meta device).
        RewriteError: a weight holds NaN or infinity; says which.
    """
    model = unwrap(student)
    _check_names(model)
    writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    tensors = _gathered(model, keep=writes)
    conversion = model.edit_conversion
    if writes:
        write(
            Path(folder),
            tensors,
            base=_name_of(base or origin_of(student) or conversion.base),
            fingerprint=conversion.fingerprint,
            unshared=tuple(conversion.originals),
            lora=conversion.lora,
            plan=json.loads(conversion.plan.to_json()),
        )
        write_for_others(Path(folder), conversion.lora, tensors)


def _check_names(student: ConvertedModel) -> None:
    """Refuse other weights than those of base and plan, from which the checkpoint is rebuilt."""
    known, added = student.edit_conversion.fingerprint, tuple(f"{path}.{ADDED}." for path in converted_sites(student))
    found = {name for name in without_lora(student, student.state_dict()) if not name.startswith(added)}
    if strange := sorted(found ^ known.keys()):
        raise CheckpointError(
            f"{', '.join(strange[:3])}{' ...' if len(strange) > 3 else ''}: not as it was at conversion. Adapters (LoRA) that other "
            "libraries added are saved by them; unload or fuse them before edit_compile.save"
        )


def _gathered(student: ConvertedModel, *, keep: bool) -> dict[str, Tensor]:
    """Gather what is the student's own on the CPU: one tensor at a time, kept or not."""
    tensors = trained_tensors(student)
    _check_values(student, tensors)
    found = {}
    for name, tensor in tensors.items():
        full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
        check_finite([(name, full)], "nothing was saved")
        if keep:  # tied weights, too, get memory of their own
            found[name] = full.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return found


def _check_values(student: nn.Module, tensors: dict[str, Tensor]) -> None:
    offloaded = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
    if offloaded:
        raise CheckpointError(f"{offloaded} has no values (meta device); undo offloading first, pipe.remove_all_hooks() for a pipeline")
    if any(_is_on_disk(module) for module in student.modules()):
        raise CheckpointError("the weights are offloaded to disk: save before enabling group offloading, or without offload_to_disk_path")
    unsaved = [n for n, p in student.named_parameters() if p.requires_grad and plain_name(student, n) not in tensors]
    if unsaved:
        raise CheckpointError(
            f"{unsaved[0]}{f' and {len(unsaved) - 1} more' if len(unsaved) > 1 else ''} can be trained, but shares its memory with the "
            "original model, which training would change too; call edit_compile.unshare(student) before training, or freeze it"
        )


def _is_on_disk(module: nn.Module) -> bool:
    """Ask diffusers' group offloading, whose parameters hold anything while their values are in a file."""
    registry = getattr(module, "_diffusers_hook", None)
    hook = registry.get_hook("group_offloading") if registry is not None else None
    return getattr(getattr(hook, "group", None), "offload_to_disk_path", None) is not None


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
        state_of_original = original_state(model)

        def replace(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
            state.clear()
            state.update(state_of_original)

        hook = model.register_state_dict_post_hook(replace)  # type: ignore[no-untyped-call]
        try:
            write_original(model, save_directory, *args, **options)
        finally:
            hook.remove()
        save(model, Path(save_directory), base=HERE)
        card = Path(save_directory) / "README.md"
        if not card.exists():
            card.write_text(_CARD)

    return {"save_pretrained": save_pretrained}
