"""Reading recipes: YAML files, shipped names, and `--set` overrides; errors name the key and its line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.errors import RecipeError

_SHIPPED = Path(__file__).parents[2] / "recipes"
Key = tuple[str | int, ...]


def shipped_recipes() -> tuple[str, ...]:
    """The names of the recipes in the package."""
    return tuple(sorted(path.stem for path in _SHIPPED.glob("*.yaml")))


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe, given its path or a shipped one's name.

    Raises:
        RecipeError: there is neither; lists the shipped ones.
    """
    path = Path(name)
    if path.is_file():
        return path
    if str(name) in shipped_recipes():
        return _SHIPPED / f"{name}.yaml"
    raise RecipeError(f"no recipe {str(name)!r}: neither a file nor one of the shipped ones: {', '.join(shipped_recipes())}")


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        name: a YAML file, or a shipped recipe's name.
        overrides: `KEY=VALUE`, such as `stages.0.steps=500`; values are YAML.

    Raises:
        RecipeError: it cannot be read; names the key, and the line if the file has one for it.
    """
    path = find_recipe(name)
    content, lines = _parse(path)
    for override in overrides:
        key, value = _split(override)
        _set(content, key, value, override)
        lines = {at: where for at, where in lines.items() if at[: len(key)] != key} | {key: f"--set {override}"}
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError("; ".join(_in_words(path, lines, problem) for problem in error.errors())) from None


def _parse(path: Path) -> tuple[dict[str, Any], dict[Key, str]]:
    try:
        text = path.read_text()
        node = yaml.compose(text, yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path} holds no recipe: it must be a mapping of keys to values")
    lines: dict[Key, str] = {}
    for key, line in _lines(node, ()):
        if key in lines:
            raise RecipeError(f"{path}:{line}: {_name(key)} is given twice, first in line {lines[key].rpartition(':')[2]}")
        lines[key] = f"{path}:{line}"
    return content, lines


def _lines(node: Any, prefix: Key) -> Iterator[tuple[Key, int]]:
    """Every key of a YAML tree with its line."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            key = (*prefix, name.value)
            yield key, name.start_mark.line + 1
            yield from _lines(value, key)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*prefix, index), value.start_mark.line + 1
            yield from _lines(value, (*prefix, index))


def _split(override: str) -> tuple[Key, Any]:
    name, equals, value = override.partition("=")
    if not equals or not name:
        raise RecipeError(f"--set {override!r}: write KEY=VALUE, such as stages.0.steps=500")
    try:
        return tuple(int(part) if part.isdigit() else part for part in name.split(".")), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: the value is not valid YAML: {' '.join(str(error).split())}") from None


def _set(content: Any, key: Key, value: Any, override: str) -> None:
    """Set a value deep inside; mappings on the way are made, elements of lists are not."""
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        if isinstance(content, list):
            if not isinstance(part, int) or part >= len(content):
                raise RecipeError(f"--set {override}: {_name(key[:depth])} has elements 0 to {len(content) - 1}, not {part!r}")
        elif not isinstance(content, dict):
            raise RecipeError(f"--set {override}: {_name(key[:depth])} is a value, {_name(key)} cannot be inside it")
        if last:
            content[part] = value
        else:
            if isinstance(content, dict) and content.get(part) is None:
                content[part] = {}
            content = content[part]


def _in_words(path: Path, lines: dict[Key, str], problem: Any) -> str:
    key, section = _place(problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = f"unknown key; {_suggestion(str(key[-1]), section.model_fields)}"
    elif problem["type"] == "union_tag_invalid":
        key, message = (*key, "kind"), f"{problem['ctx']['tag']!r}: no such kind; there are: {problem['ctx']['expected_tags']}"
    elif problem["type"] == "union_tag_not_found":
        key, message = (*key, "kind"), "Field required"
    elif problem["type"] != "missing" and isinstance(problem["input"], bool | int | float | str):
        message = f"{problem['input']!r}: {message}"
    known = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), str(path))
    return f"{known}: {_name(key)}: {message}"


def _suggestion(name: str, known: Iterable[str]) -> str:
    similar = difflib.get_close_matches(name, known, 1)
    return f"{f'did you mean {similar[0]}? ' if similar else ''}there are: {', '.join(known)}"


def _place(location: Key) -> tuple[Key, Any]:
    """The key that a location of pydantic's stands for, and the section it is in.

    Where sections are told apart by their kind, the location has that kind in it, and the file does not.
    """
    section: Any = Recipe
    key: Key = ()
    parts = list(location)
    while parts:
        part = parts.pop(0)
        key = (*key, part)
        field = getattr(section, "model_fields", {}).get(part)
        if parts and field is not None:
            kind = parts.pop(0) if field.discriminator is not None else None
            section = _section_in(field.annotation, kind)
    return key, section


def _section_in(annotation: Any, kind: str | int | None) -> Any:
    """The section within a type such as `tuple[Stage, ...]` or `LayerwiseFit | None`; of several, the one of that kind."""
    if hasattr(annotation, "model_fields"):
        kinds = getattr(annotation.model_fields.get("kind"), "annotation", None)
        return annotation if kind is None or kind in getattr(kinds, "__args__", ()) else None
    found = (_section_in(argument, kind) for argument in getattr(annotation, "__args__", ()))
    return next((section for section in found if section is not None), None)


def _name(key: Key) -> str:
    return ".".join(map(str, key))
