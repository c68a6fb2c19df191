"""Distillation: trains a converted model to do what its teacher does.

result = edit_compile.distill("demo-mm-dit", "folder")
"""

from edit_compile.distillation.data import DataConfig, DataSource, register_data
from edit_compile.distillation.evaluate.validation import ValidationResult, validate
from edit_compile.distillation.recipe.load import load_recipe, shipped_recipes
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.distillation.run import Result, distill
from edit_compile.distillation.train.losses import Comparison, register_loss

__all__ = [
    "Comparison",
    "DataConfig",
    "DataSource",
    "Recipe",
    "Result",
    "ValidationResult",
    "distill",
    "load_recipe",
    "register_data",
    "register_loss",
    "shipped_recipes",
    "validate",
]
