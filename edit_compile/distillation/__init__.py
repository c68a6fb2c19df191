"""Distillation: trains a converted model to do what its teacher does.

result = edit_compile.distill("demo-mm-dit", "folder")

Names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edit_compile.distillation.data.registry import DataConfig, register_data
    from edit_compile.distillation.data.source import DataSource
    from edit_compile.distillation.evaluate.validation import ValidationResult, validate
    from edit_compile.distillation.recipe.load import load_recipe
    from edit_compile.distillation.recipe.names import shipped_recipes
    from edit_compile.distillation.recipe.schema import Recipe
    from edit_compile.distillation.run import Result, distill
    from edit_compile.distillation.train.losses import Comparison, register_loss

_HOMES = {  # the same imports, for `__getattr__`
    "data.registry": ("DataConfig", "register_data"),
    "data.source": ("DataSource",),
    "evaluate.validation": ("ValidationResult", "validate"),
    "recipe.load": ("load_recipe",),
    "recipe.names": ("shipped_recipes",),
    "recipe.schema": ("Recipe",),
    "run": ("Result", "distill"),
    "train.losses": ("Comparison", "register_loss"),
}
_HOME = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}

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


def __getattr__(name: str) -> Any:
    """Import a name from its module (PEP 562), once."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
