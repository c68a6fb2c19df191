"""The models of a recipe: the student, the model it is made from, and what that was trained to predict."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from edit_compile.adapters.inputs import check_frames
from edit_compile.adapters.load_model import LoadedModel, load_model
from edit_compile.adapters.noise_schedule import NoiseSchedule, default_schedule, schedule_of_pipeline
from edit_compile.api import linearize
from edit_compile.config import LinearizeConfig
from edit_compile.demo import models as demo
from edit_compile.distillation.context import blocks_with_sites
from edit_compile.distillation.recipe.schema import LoraOptions, Recipe
from edit_compile.errors import DistillError, GridError
from edit_compile.student.checkpoint import INDEX, base_of, load
from edit_compile.student.handle import conversion_of
from edit_compile.student.lora import add_lora
from edit_compile.student.site import converted_sites
from edit_compile.student.weights import unshare


@dataclass(frozen=True)
class Student:
    """A converted model, and where its base pipeline or model is; None if that is unknown."""

    model: nn.Module
    base: str | None


def make_student(recipe: Recipe, *, structure_only: bool = False) -> Student:
    """Load a recipe's converted model, or convert its model.

    Args:
        structure_only: convert without weights, which need not exist.

    Raises:
        DistillError: a converted model is to be converted, or there are no weights to distill.
        ModelNotFoundError, CheckpointError, PlanError: the model cannot be loaded or converted.
    """
    if _is_converted(recipe):
        if recipe.convert != LinearizeConfig():
            raise DistillError(f"{recipe.model} is already converted: leave convert: out of the recipe")
        return Student(load(recipe.model), base_of(recipe.model))
    torch.manual_seed(recipe.seed)  # of what conversion adds, and of random weights
    if structure_only:
        loaded = load_model(recipe.model, structure_only=True)
    else:
        loaded = load_model(recipe.model, dtype=recipe.dtype, random_weights=recipe.data.random_weights)
        if not loaded.has_weights:
            raise DistillError(
                f"{recipe.model} is structure only, without weights to distill; data: {{kind: random}} tries speed and memory "
                "with random weights"
            )
    return Student(linearize(loaded, recipe.convert), _base(loaded))


def load_original(recipe: Recipe, *, structure_only: bool = False) -> tuple[nn.Module, str]:
    """Load the model that a recipe's student is made from, without converting it; returns also where its pipeline is.

    Raises:
        DistillError: the recipe's converted model does not say where its base is.
        ModelNotFoundError: the model cannot be loaded.
    """
    name = base_of(recipe.model) if _is_converted(recipe) else recipe.model
    if name is None:
        raise DistillError(f"{recipe.model} does not say where its base pipeline is")
    loaded = load_model(name, dtype=recipe.dtype, structure_only=structure_only)
    return loaded.model, _base(loaded)


def noise_schedule(recipe: Recipe, base: str | None) -> NoiseSchedule:
    """Find out what the teacher was trained to predict: as the recipe says, or from its pipeline's scheduler.

    Raises:
        DistillError: it is unknown.
    """
    if recipe.prediction != "auto":
        return default_schedule(recipe.prediction)
    # From random weights nothing is learned, and recorded calls are noisy already: any schedule will do.
    if base in demo.SOURCES or recipe.data.random_weights or recipe.data.recorded_calls:
        return default_schedule("rectified-flow")
    if base is None:
        raise DistillError("what the model predicts is not known without its pipeline; set prediction: in the recipe")
    return schedule_of_pipeline(base)


def check_frames_of(recipe: Recipe, model: nn.Module) -> None:
    """Raise DistillError if a recipe wants videos of a model that makes images, or videos of a length that it cannot make."""
    named = [("layerwise", recipe.layerwise), *((f"stages.{number}", stage) for number, stage in enumerate(recipe.stages))]
    for name, phase in named:
        if phase is not None and phase.frames is not None:
            try:
                check_frames(model, phase.frames)
            except GridError as error:
                raise DistillError(f"{name}.frames: {error}") from error


def give_lora(student: nn.Module, options: LoraOptions) -> None:
    """Add a recipe's LoRA to a student, unless it has the same from an earlier run, which is trained on.

    Raises:
        DistillError: it has another.
        ConfigError, EditCompileError: as `add_lora`.
    """
    alpha, found = options.alpha or options.rank, conversion_of(student).lora
    if found is None:
        add_lora(student, options.rank, alpha, options.targets)
    elif (found.rank, found.alpha) != (options.rank, alpha):
        raise DistillError(
            f"lora: the student has LoRA of rank {found.rank} and alpha {found.alpha:g} already: ask for the same, "
            "or merge it first with edit_compile.merge_lora"
        )


def unshare_blocks(student: nn.Module) -> None:
    """Give a student weights of its own in all repeated blocks that hold sites."""
    sites = tuple(f"{path}." for path in converted_sites(student))
    outside = [n for n, p in student.named_parameters(remove_duplicate=False) if p.is_floating_point() and not n.startswith(sites)]
    blocks = [block for block in blocks_with_sites(student) if any(name.startswith(f"{block}.") for name in outside)]
    if blocks:
        unshare(student, [f"{block}.*" for block in blocks])


def _is_converted(recipe: Recipe) -> bool:
    return (Path(recipe.model) / INDEX).is_file()


def _base(loaded: LoadedModel) -> str:
    return loaded.pipeline or loaded.source
