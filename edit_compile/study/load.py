"""Reads studies, and resolves each of their cells to a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edit_compile.distillation.recipe.load import load_recipe, read_yaml
from edit_compile.distillation.recipe.names import find_recipe
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.errors import RecipeError, StudyError, suggestion
from edit_compile.study.schema import Study

_SHIPPED = Path(__file__).parents[1] / "recipes" / "studies"


def shipped_studies() -> tuple[str, ...]:
    """List the names of the studies in the package."""
    return tuple(sorted(path.stem for path in _SHIPPED.glob("*.yaml")))


def find_study(name: str | Path) -> Path:
    """Find the file of a study, given its path or a shipped one's name.

    Raises:
        StudyError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    if str(name) in shipped_studies():
        return _SHIPPED / f"{name}.yaml"
    raise StudyError(
        f"no study {str(name)!r}: neither a file nor a run's folder nor a shipped study; {suggestion(str(name), shipped_studies())}"
    )


def load_study(path: Path) -> Study:
    """Read a study and check that each of its configurations is a recipe.

    Raises:
        StudyError: it cannot be read, or a configuration is none; names the key, and the line if the file has one for it.
    """
    try:
        content, lines = read_yaml(path, "study")
    except RecipeError as error:
        raise StudyError(str(error)) from None
    try:
        study = Study.model_validate(content)
    except ValidationError as error:
        raise StudyError("; ".join(_in_words(path, lines, problem) for problem in error.errors())) from None
    models = {name: resolve(study, path, name, study.seeds[0]).model for name in study.configurations}
    other = next((name for name, model in models.items() if model != next(iter(models.values()))), None)
    if other is not None:
        raise StudyError(f"{path}: configuration {other!r} is of another model, {models[other]}: a study compares conversions of one model")
    return study


def resolve(study: Study, path: Path, name: str, seed: int) -> Recipe:
    """Return the recipe of a cell, with the base recipe's own numbers of steps.

    Args:
        path: of the study's file, which a base recipe's file is relative to.

    Raises:
        StudyError: it is not a recipe; names the configuration and the key.
    """
    changes = [*flattened(study.change), *flattened(study.configurations[name]), ("seed", seed)]
    beside = path.parent / study.recipe
    try:
        base = beside if beside.is_file() else find_recipe(study.recipe)
        return load_recipe(base, changes)
    except RecipeError as error:
        raise StudyError(f"{path}: configuration {name!r}: {error}") from None


def flattened(changes: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested changes as dotted keys with their values; lists and empty mappings are values."""
    for name, value in changes.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _in_words(path: Path, lines: Mapping[tuple[str | int, ...], str], problem: Any) -> str:
    key = tuple(part for part in problem["loc"] if part != "[key]")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = [field.alias or name for name, field in Study.model_fields.items()] if len(key) == 1 else []
        message = f"unknown key; {suggestion(str(key[-1]), known)}" if known else "unknown key"
    where = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), str(path))
    return ": ".join(part for part in (where, ".".join(map(str, key)), message) if part)
