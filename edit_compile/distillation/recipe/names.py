"""The names of recipes, which cost nothing to look up."""

from __future__ import annotations

from pathlib import Path

from edit_compile.errors import RecipeError, suggestion

_SHIPPED = Path(__file__).parents[2] / "recipes"


def shipped_recipes() -> tuple[str, ...]:
    """List the names of the recipes in the package."""
    return tuple(sorted(path.stem for path in _SHIPPED.glob("*.yaml")))


def find_recipe(name: str | Path) -> Path:
    """Find the file of a recipe, given its path or a shipped one's name.

    Raises:
        RecipeError: there is neither; lists the shipped ones, the most similar first.
    """
    path = Path(name)
    if path.is_file():
        return path
    if str(name) in shipped_recipes():
        return _SHIPPED / f"{name}.yaml"
    raise RecipeError(f"no recipe {str(name)!r}: neither a file nor one of the shipped ones; {suggestion(str(name), shipped_recipes())}")


def model_of(name: str) -> str:
    """Return the model of a shipped recipe."""
    import yaml

    return str(yaml.safe_load(find_recipe(name).read_text())["model"])


def about(name: str) -> str:
    """Return what the first comment of a shipped recipe says first."""
    first = find_recipe(name).read_text().partition("\n")[0]
    return first.removeprefix("#").strip().partition(". ")[0].removesuffix(".")
