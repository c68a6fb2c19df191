"""The models of a recipe: the student, the model it is made from, and what that was trained to predict."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from edit_compile.adapters.conditioning import image_condition
from edit_compile.adapters.inputs import check_frames, tokens_of_size
from edit_compile.adapters.load_model import LoadedModel, load_model
from edit_compile.adapters.noise_schedule import NoiseSchedule, default_schedule, schedule_of_pipeline
from edit_compile.adapters.stored_dtype import stored_dtype
from edit_compile.api import linearize, linearize_for_shards
from edit_compile.config import LinearizeConfig
from edit_compile.demo import models as demo
from edit_compile.distillation.context import blocks_with_sites
from edit_compile.distillation.recipe.schema import LoraOptions, Recipe
from edit_compile.errors import DistillError, GridError, NoExampleInputsError
from edit_compile.student.checkpoint import as_checkpoint_says, base_of, load, load_for_shards
from edit_compile.student.handle import conversion_of, unwrap
from edit_compile.student.hub import find_checkpoint
from edit_compile.student.lora import add_lora
from edit_compile.student.site import converted_sites
from edit_compile.student.weights import own_weights


@dataclass(frozen=True)
class Student:
    """A converted model.

    Attributes:
        base: where its base pipeline or model is; None if that is unknown.
        loaded_in: the dtype that its weights are to be rounded to, if they are in that of their files until they are sharded.
    """

    model: nn.Module
    base: str | None
    loaded_in: torch.dtype | None = None


def make_student(recipe: Recipe, *, structure_only: bool = False, other_data: bool = False, for_shards: bool = False) -> Student:
    """Load a recipe's converted model, or convert its model.

    Args:
        structure_only: convert without weights, which need not exist.
        other_data: it is not trained on the recipe's data.
        for_shards: nothing is written to its weights until they are sharded, and they are in the dtype of their files; see
            `linearize_for_shards`.

    Raises:
        DistillError: a converted model is to be converted, there are no weights to distill, or the data are missing or do
            not fit the model.
        ModelNotFoundError, CheckpointError, PlanError: the model cannot be loaded or converted.
    """
    if find_checkpoint(recipe.model) is not None:
        if recipe.convert != LinearizeConfig():
            raise DistillError(f"{recipe.model} is already converted: leave convert: out of the recipe")
        base = base_of(recipe.model)
        if base is not None and not other_data:
            with as_checkpoint_says(recipe.model, base):
                structure = load_model(base, structure_only=True)
            check_data(recipe, structure, files=not structure_only)
        return Student(load_for_shards(recipe.model), base, torch.float32) if for_shards else Student(load(recipe.model), base)
    loaded = load_model(recipe.model, structure_only=True)
    if not other_data:
        check_data(recipe, loaded, files=not structure_only)
    torch.manual_seed(recipe.seed)  # of what conversion adds, and of random weights
    if not structure_only:
        dtype = (for_shards and stored_dtype(loaded)) or recipe.dtype
        loaded = load_model(recipe.model, dtype=dtype, random_weights=recipe.data.random_weights)
        if not loaded.has_weights:
            raise DistillError(
                f"{recipe.model} is structure only, without weights to distill; data: {{kind: random}} tries speed and memory "
                "with random weights"
            )
    if for_shards:
        return Student(linearize_for_shards(loaded, recipe.convert), _base(loaded), recipe.dtype)
    return Student(linearize(loaded, recipe.convert), _base(loaded))


def load_original(recipe: Recipe, *, structure_only: bool = False) -> tuple[nn.Module, str]:
    """Load the model that a recipe's student is made from, without converting it; returns also where its pipeline is.

    Raises:
        DistillError: the recipe's converted model does not say where its base is, or the data do not fit the model.
        ModelNotFoundError: the model cannot be loaded.
    """
    converted = find_checkpoint(recipe.model) is not None
    name = base_of(recipe.model) if converted else recipe.model
    if name is None:
        raise DistillError(f"{recipe.model} does not say where its base pipeline is")
    with as_checkpoint_says(recipe.model, name) if converted else nullcontext():
        loaded = load_model(name, structure_only=True)
        check_data(recipe, loaded, files=not structure_only)
        if not structure_only:
            loaded = load_model(name, dtype=recipe.dtype)
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


def stages_below_min_tokens(recipe: Recipe, student: nn.Module, min_tokens: int) -> list[str]:
    """Say which stages train a student at sizes at which it will run as the original, as far as its adapter tells their tokens."""
    found = []
    for number, stage in enumerate(recipe.stages):
        try:
            tokens = math.prod(tokens_of_size(student, *stage.resolution, stage.frames))
        except (GridError, NoExampleInputsError):
            continue
        if tokens < min_tokens:
            why = f"min_tokens is {min_tokens:,}; larger sizes gain by it"
            found.append(f"stages.{number} trains with {tokens:,} image tokens, where the student will run as the original: {why}")
    return found


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


def unshare_blocks(student: nn.Module, *, read_only: bool = False) -> None:
    """Give a student weights of its own in all repeated blocks that hold sites.

    Args:
        read_only: as of `own_weights`.
    """
    sites = tuple(f"{path}." for path in converted_sites(student))
    outside = [n for n, p in student.named_parameters(remove_duplicate=False) if p.is_floating_point() and not n.startswith(sites)]
    blocks = [block for block in blocks_with_sites(student) if any(name.startswith(f"{block}.") for name in outside)]
    if blocks:
        own_weights(unwrap(student), [f"{block}.*" for block in blocks], read_only=read_only)


def check_data(recipe: Recipe, structure: LoadedModel, *, files: bool = True) -> None:
    """Find out before weights are loaded whether a model can be trained on a recipe's data.

    Args:
        structure: the model, of which weights may be missing.
        files: look at the data's files as well.

    Raises:
        DistillError: the data do not fit the model, or it is given images besides captions, which only calls recorded from its
            pipeline have.
    """
    condition = None if recipe.data.recorded_calls else image_condition(structure)
    if condition is not None:
        raise DistillError(
            f"{recipe.model}: {condition}, which data: {{kind: {recipe.data.kind}}} does not have: use data: {{kind: pipeline}}, "
            "which records the pipeline's own calls"
        )
    recipe.data.check_model(structure.model, _base(structure))
    if files:
        recipe.data.check_files(structure.model)


def _base(loaded: LoadedModel) -> str:
    return loaded.pipeline or loaded.source
