"""A dry run: what a recipe would do, found out on the model's structure alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from edit_compile.adapters.models import load_model
from edit_compile.api import linearize, plan_of
from edit_compile.checkpoint import INDEX, load
from edit_compile.distill.context import trained_parameters
from edit_compile.distill.recipe import Recipe
from edit_compile.plans import Plan

_BYTES = 4


@dataclass(frozen=True)
class Trial:
    """What a recipe would do.

    Attributes:
        parameters, trained: numbers of the student's parameters, and of those trained.
        state_bytes: of all weights, and of gradients, optimizer and moving average of those trained; activations come on top.
    """

    recipe: Recipe
    plan: Plan
    parameters: int
    trained: int
    state_bytes: int

    def to_dict(self) -> dict[str, Any]:
        numbers = {"parameters": self.parameters, "trained": self.trained, "state_bytes": self.state_bytes}
        return {"recipe": self.recipe.model_dump(mode="json"), **numbers}


def trial(recipe: Recipe) -> Trial:
    """Work it out without weights, where the model's name allows that."""
    student = _structure(recipe)
    parameters = sum(p.numel() for p in student.parameters())
    trained = sum(p.numel() for p in trained_parameters(student, recipe.train).values())
    copies = 4 if recipe.ema is not None else 3  # gradient, two moments, and the average
    return Trial(recipe, plan_of(student), parameters, trained, _BYTES * (parameters + copies * trained))


def _structure(recipe: Recipe) -> nn.Module:
    if (Path(recipe.model) / INDEX).is_file():
        return load(recipe.model)
    return linearize(load_model(recipe.model, structure_only=True).model, recipe.convert)
