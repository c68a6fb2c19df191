"""Nodes of ComfyUI that load a converted model and draw with it. README.md beside this file says how they are installed."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

import edit_compile as ec
from edit_compile.report.compare_samples import open_sampler, sample_options
from edit_compile.student.checkpoint import base_of

_CATEGORY = "edit_compile"
_STUDENT = "EDIT_COMPILE_STUDENT"  # the type of the wires between these nodes
_ANY_SEED = 2**32 - 1
_USUAL = "0: the model's own"


class LoadStudent:
    """Loads a checkpoint with its base: what `edit-compile distill` or `convert` wrote, or a hub id."""

    CATEGORY = _CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = (_STUDENT,)
    RETURN_NAMES = ("student",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        """Return the fields of the node."""
        return {
            "required": {
                "checkpoint": ("STRING", {"default": "", "tooltip": "folder or hub id of a converted model"}),
                "dtype": (["bfloat16", "float16", "float32"], {"tooltip": "of the weights; the demo models take float32 alone"}),
            },
            "optional": {"base": ("STRING", {"default": "", "tooltip": "folder or hub id of the original; empty: as the checkpoint says"})},
        }

    @classmethod
    def IS_CHANGED(cls, checkpoint: str, dtype: str, base: str = "") -> str:
        """Load again what was trained again in the meantime."""
        index = Path(checkpoint) / "edit_compile.json"
        return str(index.stat().st_mtime_ns) if index.is_file() else ""

    def load(self, checkpoint: str, dtype: str, base: str = "") -> tuple[Any]:
        """Return what `Draw` draws with: a pipeline or a model, and where its base is."""
        model, _ = open_sampler(checkpoint, base or None, sample_options(dtype=dtype))
        return ((model, base or base_of(checkpoint)),)


class Draw:
    """Draws images of a prompt with the student, or with the original attention from the same noise."""

    CATEGORY = _CATEGORY
    FUNCTION = "draw"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    ATTENTION: ClassVar = ["student", "teacher"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        """Return the fields of the node."""
        return {
            "required": {
                "student": (_STUDENT,),
                "prompt": ("STRING", {"default": "", "multiline": True}),
                "attention": (cls.ATTENTION,),
                "width": ("INT", {"default": 0, "min": 0, "max": 16384, "step": 2, "tooltip": f"in pixels; {_USUAL}"}),
                "height": ("INT", {"default": 0, "min": 0, "max": 16384, "step": 2, "tooltip": f"in pixels; {_USUAL}"}),
                "steps": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": _USUAL}),
                "guidance": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.1, "tooltip": _USUAL}),
                "seed": ("INT", {"default": 0, "min": 0, "max": _ANY_SEED, "control_after_generate": True}),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 64, "tooltip": "images; the n-th has seed + n - 1"}),
            }
        }

    def draw(
        self,
        student: tuple[Any, str | None],
        prompt: str,
        attention: str,
        width: int,
        height: int,
        steps: int,
        guidance: float,
        seed: int,
        batch_size: int,
    ) -> tuple[torch.Tensor]:
        """Return images (batch_size, height, width, 3) in [0, 1]; of videos, their frames one after the other."""
        model, base = student
        given = {"width": width, "height": height, "steps": steps, "guidance": guidance}
        _, sample_many = open_sampler(model, base, sample_options(**{name: value for name, value in given.items() if value}))
        with ec.teacher(model) if attention == "teacher" else nullcontext():
            drawn = [sample_many([prompt], [seed + number])[0] for number in range(batch_size)]
        frames = [image if image.ndim == 4 else image[None] for image in drawn]
        return (torch.from_numpy(np.concatenate(frames)).float(),)


NODE_CLASS_MAPPINGS = {"EditCompileLoadStudent": LoadStudent, "EditCompileDraw": Draw}
NODE_DISPLAY_NAME_MAPPINGS = {
    "EditCompileLoadStudent": "Load student (edit_compile)",
    "EditCompileDraw": "Draw with student (edit_compile)",
}
