"""diffusers' own ways of saving: where a model came from, and `save_pretrained` of a converted one."""

from __future__ import annotations

import copy
import functools
import types
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edit_compile.errors import CheckpointError
from edit_compile.sharing import original_state


def origin_of(model: Any) -> str | None:
    """The hub id or folder that a model or pipeline was loaded from, if it remembers one."""
    config = getattr(model, "config", None)
    name = config.get("_name_or_path") if isinstance(config, dict) else None
    return str(name) if name else None


def with_transformer(pipeline: Any, transformer: nn.Module) -> Any:
    """A pipeline with the same components and settings but another transformer."""
    changed = copy.copy(pipeline)
    changed.register_modules(transformer=transformer)
    return changed


def save_whole(student: nn.Module) -> nn.Module:
    """Let `student.save_pretrained(folder)`, and so the `save_pretrained` of its pipeline, write a folder that holds both: the
    original model, as diffusers reads it, and beside it the checkpoint, as `edit_compile.load` reads it.
    """
    own = getattr(type(student), "save_pretrained", None)
    if own is None:
        return student

    @functools.wraps(own)
    def save_pretrained(model: nn.Module, save_directory: Any, *args: Any, push_to_hub: bool = False, **options: Any) -> None:
        from edit_compile.checkpoint import save

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
