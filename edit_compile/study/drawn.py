"""What models draw of held-out captions: images for the gallery, and of demo models features for the Frechet distance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edit_compile.adapters.denoise import denoise
from edit_compile.demo import features, models
from edit_compile.demo.prompt_adherence import Adherence, draw, held_out
from edit_compile.distillation.context import Context
from edit_compile.distillation.data import open_source
from edit_compile.distillation.evaluate.sample_grid import decoded, sample, start_of
from edit_compile.distillation.models import Student, noise_schedule
from edit_compile.distillation.recipe.schedule import phases_of
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.distillation.train.distributed import make_accelerator, set_precision
from edit_compile.errors import StudyError
from edit_compile.files import replacing
from edit_compile.study.schema import KEPT_IMAGES

DRAWN = "drawn.safetensors"


@dataclass(frozen=True)
class Drawn:
    """What a model drew: captions with an image or a video each, and features (N, D) of all that it drew, if there are any."""

    captions: tuple[str, ...]
    images: tuple[np.ndarray, ...]
    features: Tensor | None = None

    def save(self, folder: Path, model: str) -> None:
        """Write it to a folder, with the model's identity, at once or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.from_numpy(np.stack(self.images).clip(0, 1) * 255).round().to(torch.uint8).contiguous()
        tensors = {"images": pixels} | ({} if self.features is None else {"features": self.features})
        with replacing(folder / DRAWN) as temporary:
            save_file(tensors, temporary, {"captions": json.dumps(self.captions), "model": model})

    @classmethod
    def read(cls, folder: Path, model: str) -> Drawn | None:
        """Read what `save` wrote; None if it is not there, damaged, or another model's."""
        try:
            with safe_open(folder / DRAWN, "pt") as file:
                names, said = file.keys(), file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError):
            return None
        if said.get("model") != model:
            return None
        captions = json.loads(said["captions"])
        return cls(tuple(captions), tuple((tensors["images"].float() / 255).numpy()), tensors.get("features"))


def draw_demo(model: nn.Module, count: int, steps: int) -> tuple[Drawn, Adherence]:
    """Let a demo model draw the first `count` held-out captions, always from the same noise, and check what it drew."""
    data = models.trained_on(model)
    asked = held_out(data, count)
    samples = draw(model, asked.captions, steps)
    kept = tuple(samples[:KEPT_IMAGES].movedim(1, -1).contiguous().numpy())
    found = features.features(samples) if has_features(data) else None
    return Drawn(asked.captions[:KEPT_IMAGES], kept, found), asked.check(samples)


def has_features(data: models.TrainingData) -> bool:
    """Tell whether the Frechet distance can be had for what a demo model was trained on."""
    return data in (models.GROUPS, models.SHAPES)


@cache
def real_features(data: models.TrainingData, count: int) -> Tensor:
    """Compute the features of true images of the first held-out captions of what a demo model was trained on, (count, D)."""
    return features.features(held_out(data, count).true_samples())


def draw_by_recipe(recipe: Recipe, student: Student, count: int, *, teacher: bool = False) -> Drawn:
    """Let a converted model draw the first validation captions of a recipe's data, as the recipe's sample grids do.

    Raises:
        StudyError: there is nothing to draw, or nothing decodes it; says why.
    """
    if recipe.data.recorded_calls:
        raise StudyError(f"data of kind {recipe.data.kind} has calls of the model, no captions to draw")
    context, last = _context(recipe, student), phases_of(recipe)[-1]
    start = start_of(context, count, last.height, last.width, last.frames)
    if start is None:
        raise StudyError(f"data of kind {recipe.data.kind} cannot decode latents to images")
    with context.teacher_mode() if teacher else nullcontext(student.model) as model:
        latents = sample(context, model, start)
    return Drawn(start.captions, tuple(decoded(context, latents)))


def _context(recipe: Recipe, student: Student) -> Context:
    """Make what sampling needs of a run, without its folder."""
    accelerator = make_accelerator(recipe.model_copy(update={"trackers": ()}), Path())
    set_precision(student.model.eval(), (), recipe.precision)
    student.model.to(accelerator.device)
    options: dict[str, Any] = {"base": student.base, "device": accelerator.device, "dtype": recipe.dtype}
    source = open_source(recipe.data, student.model, recipe.seed, **options)
    return Context(recipe, student.model, student.model, source, denoise, noise_schedule(recipe, student.base), accelerator)


def gallery_columns(
    drawn: Sequence[tuple[str, Drawn | None]], rows: int
) -> tuple[tuple[str, ...], list[tuple[str, tuple[np.ndarray, ...]]]]:
    """Choose captions, and for every model that drew the first one's captions a column of images, at most `rows` of them."""
    there = [(name, one) for name, one in drawn if one is not None]
    captions = there[0][1].captions[:rows] if there else ()
    return captions, [(name, one.images[:rows]) for name, one in there if one.captions[:rows] == captions]
