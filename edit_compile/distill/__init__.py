"""Distillation: from a converted model to one that does what its teacher does.

result = edit_compile.distill.distill("demo-mm-dit", "folder")
"""

from edit_compile.distill.held_out import HeldOutError, held_out_error
from edit_compile.distill.recipe import Recipe
from edit_compile.distill.recipe_file import load_recipe, shipped_recipes
from edit_compile.distill.runner import Result, distill

__all__ = ["HeldOutError", "Recipe", "Result", "distill", "held_out_error", "load_recipe", "shipped_recipes"]
