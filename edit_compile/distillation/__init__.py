"""Distillation: from a converted model to one that does what its teacher does.

result = edit_compile.distill.distill("demo-mm-dit", "folder")
"""

from edit_compile.distillation.evaluate.validation import HeldOutError, held_out_error
from edit_compile.distillation.recipe.load import load_recipe, shipped_recipes
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.distillation.run import Result, distill

__all__ = ["HeldOutError", "Recipe", "Result", "distill", "held_out_error", "load_recipe", "shipped_recipes"]
