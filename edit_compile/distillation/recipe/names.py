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


def is_recipe_file(name: str) -> bool:
    """Say whether a name is that of a YAML file."""
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def model_of(name: str) -> str:
    """Return the model of a recipe, given its file or a shipped one's name.

    Raises:
        RecipeError: the file names none.
    """
    from edit_compile.yaml_text import parse_yaml, read_text

    path = find_recipe(name)
    try:
        content = parse_yaml(read_text(path))
    except ValueError as error:
        raise RecipeError(f"{path} {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), str):
        raise RecipeError(f"{path} is not a recipe: it names no model")
    return str(content["model"])


def about(name: str) -> str:
    """Return what the first comment of a shipped recipe says first."""
    first = find_recipe(name).read_text("utf-8").partition("\n")[0]
    return first.removeprefix("#").strip().partition(". ")[0].removesuffix(".")
