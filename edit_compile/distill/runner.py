"""Distilling, from a recipe to a finished folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from edit_compile.adapters.denoise import denoise as denoise_by_family
from edit_compile.adapters.models import load_model
from edit_compile.adapters.schedulers import default_process, process_of_pipeline
from edit_compile.api import linearize
from edit_compile.checkpoint import INDEX, load, save
from edit_compile.config import LinearizeConfig
from edit_compile.demo.models import NAMES as DEMOS
from edit_compile.distill.context import Context, Denoise
from edit_compile.distill.data import Source, open_source
from edit_compile.distill.held_out import HeldOutError, held_out_error
from edit_compile.distill.metrics import JsonLines, Row
from edit_compile.distill.noise import Process
from edit_compile.distill.recipe import Recipe
from edit_compile.distill.recipe_file import load_recipe
from edit_compile.distill.training import Trainer
from edit_compile.errors import DistillError
from edit_compile.sites import converted_sites


@dataclass(frozen=True)
class Result:
    """A finished distillation.

    Attributes:
        folder: where the student is: `edit_compile.load(folder)`.
        before, after: the held-out error of the converted model and of the student, at the last stage's resolution.
        seconds: of training, measurements left out.
    """

    folder: Path
    student: nn.Module
    before: HeldOutError
    after: HeldOutError
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        errors = {"before": self.before.to_dict(), "after": self.after.to_dict()}
        return {"folder": str(self.folder), "seconds": round(self.seconds, 1), "held_out_error": errors}


def distill(
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    *,
    student: nn.Module | None = None,
    source: Source | None = None,
    denoise: Denoise | None = None,
    process: Process | None = None,
    report: Callable[[Row], None] | None = None,
) -> Result:
    """Train a converted model to do what its teacher does.

    Args:
        recipe: a recipe, a YAML file, or a shipped recipe's name.
        output: the folder to write: the student's checkpoint, `recipe.yaml`, `metrics.jsonl`, `result.json`. Default:
            `runs/` and the recipe's name.
        student: a converted model, trained in place, instead of the recipe's `model`.
        source, denoise, process: instead of what the recipe and the model's family give: the data, how the model is
            called, and what it predicts.
        report: called with every row of metrics.

    Raises:
        RecipeError: the recipe is wrong.
        DistillError: the run cannot start or go on.
    """
    name = "distilled" if isinstance(recipe, Recipe) else Path(recipe).stem
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    folder = Path(output) if output is not None else Path("runs") / name
    folder.mkdir(parents=True, exist_ok=True)
    base, student, found = _student(recipe) if student is None else (None, student, None)
    process = process or found or _process(recipe, None)
    context = _context(recipe, student, source, denoise or denoise_by_family, process)
    return _run(context, folder, base, report or (lambda row: None))


def _run(context: Context, folder: Path, base: str | None, report: Callable[[Row], None]) -> Result:
    recipe, metrics = context.recipe, JsonLines(folder / "metrics.jsonl")
    metrics.path.unlink(missing_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))

    def both(row: Row) -> None:
        metrics.write(row)
        report(row)

    resolution = recipe.stage[-1].resolution
    before = held_out_error(context, *resolution)
    start = time.monotonic()
    Trainer(context, both).run()
    seconds = time.monotonic() - start
    result = Result(folder, context.student, before, held_out_error(context, *resolution), seconds)
    if context.accelerator.is_main_process:
        save(context.student, folder, base=base)
        (folder / "result.json").write_text(json.dumps(result.to_dict(), indent=2))
    return result


def _context(recipe: Recipe, student: nn.Module, source: Source | None, denoise: Denoise, process: Process) -> Context:
    from accelerate import Accelerator

    if not converted_sites(student):
        raise DistillError(f"{type(student).__name__} is not converted: there is nothing to distill; linearize(model) converts it")
    accelerator = Accelerator()
    student.eval().to(accelerator.device)  # evaluation mode: teacher and student must see the same
    return Context(recipe, student, source or open_source(recipe.data, student, recipe.seed), denoise, process, accelerator)


def _student(recipe: Recipe) -> tuple[str | None, nn.Module, Process]:
    """Where the base model is, the student, and what it predicts."""
    if (Path(recipe.model) / INDEX).is_file():
        if recipe.convert != LinearizeConfig():
            raise DistillError(f"{recipe.model} is converted already: leave convert: out of the recipe")
        student = load(recipe.model)
        base = student.__dict__.get("edit_base")
        return base, student, _process(recipe, base)
    loaded = load_model(recipe.model)
    torch.manual_seed(recipe.seed)  # of what conversion adds
    if not loaded.has_weights:
        raise DistillError(f"{recipe.model} is structure only, without weights to distill")
    base = loaded.pipeline or loaded.source
    return base, linearize(loaded.model, recipe.convert), _process(recipe, base)


def _process(recipe: Recipe, base: str | None) -> Process:
    if recipe.prediction != "auto":
        return default_process(recipe.prediction)
    if base is None:
        raise DistillError("what the model predicts is not known without its pipeline; set prediction: in the recipe")
    if base in [f"demo/{name}" for name in DEMOS]:
        return Process("rectified-flow")
    return process_of_pipeline(base)
