"""Reads recipes: YAML files, shipped names, and `--set` overrides. Errors name the key and its line."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from edit_compile.distillation.data.registry import DATA, DataConfig
from edit_compile.distillation.recipe.names import find_recipe
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.errors import RecipeError, suggestion
from edit_compile.yaml_text import parse_with_node, parse_yaml, read_text

Key = tuple[str | int, ...]


def load_recipe(name: str | Path, overrides: Sequence[str | tuple[str, Any]] = ()) -> Recipe:
    """Read a recipe.

    Args:
        name: a YAML file, or a shipped recipe's name.
        overrides: `KEY=VALUE`, for example `stages.0.steps=500`, whose values are YAML; or pairs of a key and its value.

    Raises:
        RecipeError: it cannot be read; names the key, and the line if the file has one for it.
    """
    path = find_recipe(name)
    content, lines = read_yaml(path)
    for override in overrides:
        key, value, said = _split(override)
        _set(content, key, value, said)
        lines = {at: where for at, where in lines.items() if at[: len(key)] != key} | {key: said}
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError("; ".join(_in_words(path, content, lines, problem) for problem in _causes(error.errors()))) from None


def read_yaml(path: Path, what: str = "recipe") -> tuple[dict[str, Any], dict[Key, str]]:
    """Read a mapping from a YAML file, and where each of its keys is: `file:line`.

    Args:
        what: the file holds, for errors.

    Raises:
        RecipeError: it cannot be read, is no mapping, or gives a key twice.
    """
    try:
        content, node = parse_with_node(read_text(path))
    except ValueError as error:
        raise RecipeError(f"{path} {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path} is not a {what}: it must be a mapping of keys to values")
    lines: dict[Key, str] = {}
    for key, line in _lines(node, ()):
        if key in lines:
            raise RecipeError(f"{path}:{line}: {_name(key)} is given twice, first in line {lines[key].rpartition(':')[2]}")
        lines[key] = f"{path}:{line}"
    return content, lines


def _lines(node: Any, prefix: Key) -> Iterator[tuple[Key, int]]:
    """Yield every key of a YAML tree with its line."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            key = (*prefix, name.value)
            yield key, name.start_mark.line + 1
            yield from _lines(value, key)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*prefix, index), value.start_mark.line + 1
            yield from _lines(value, (*prefix, index))


def _split(override: str | tuple[str, Any]) -> tuple[Key, Any, str]:
    """Return the key of an override, its value, and where it is from, in words."""
    if isinstance(override, tuple):
        name, value = override
        return _parts(name), copy.deepcopy(value), f"{name}={value}"  # later ones may set something inside it
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise RecipeError(f"--set {override!r}: write KEY=VALUE, for example stages.0.steps=500")
    try:
        return _parts(name), parse_yaml(text), f"--set {override}"
    except ValueError as error:
        raise RecipeError(f"--set {override}: the value {error}") from None


def _parts(name: str) -> Key:
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))


def _set(content: Any, key: Key, value: Any, said: str) -> None:
    """Set a value deep inside; missing mappings on the way are created, elements of lists are not."""
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        if isinstance(content, list):
            if not isinstance(part, int) or part >= len(content):
                raise RecipeError(f"{said}: {_name(key[:depth])} has elements 0 to {len(content) - 1}, not {part!r}")
        elif not isinstance(content, dict):
            raise RecipeError(f"{said}: {_name(key[:depth])} is a value, {_name(key)} cannot be inside it")
        if last:
            content[part] = value
        else:
            if isinstance(content, dict) and content.get(part) is None:
                content[part] = {}
            content = content[part]


def _causes(problems: Sequence[Any]) -> list[Any]:
    """Leave out the lists that are too short for what is wrong with their elements."""
    places = [problem["loc"] for problem in problems]

    def follows(problem: Any) -> bool:
        place = problem["loc"]
        return problem["type"] == "too_short" and any(other != place and other[: len(place)] == place for other in places)

    return [problem for problem in problems if not follows(problem)]


def _in_words(path: Path, content: dict[str, Any], lines: dict[Key, str], problem: Any) -> str:
    is_key = problem["loc"][-1:] == ("[key]",)  # the key of a mapping is wrong, not its value
    key: Key = problem["loc"][:-1] if is_key else problem["loc"]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        deeper = _places(str(key[0])) if len(key) == 1 else []
        meant = f"did you mean {' or '.join(deeper)}?" if deeper else suggestion(str(key[-1]), _section(key[:-1], content).model_fields)
        message = f"unknown key; {meant}"
    elif problem["type"] != "missing" and not is_key and isinstance(problem["input"], bool | int | float | str):
        message = f"{problem['input']!r}: {message}"
    known = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), str(path))
    return ": ".join(part for part in (known, _name(key), message) if part)  # what is wrong between keys has none


def _section(key: Key, content: Any) -> type[BaseModel]:
    """Find the class of the section at a key."""
    section: type[BaseModel] = Recipe
    for part in key:
        content = content[part]
        if isinstance(part, str):
            section = _model_in(section.model_fields[part].annotation)
        if issubclass(section, DataConfig) and isinstance(content, dict):
            section = DATA.get(content["kind"])
    return section


def _places(name: str) -> list[str]:
    """List where sections of a recipe have a key of this name: `layerwise.lr`, `stages.0.lr`."""
    sections = {key: (_model_in(field.annotation), get_origin(field.annotation) is tuple) for key, field in Recipe.model_fields.items()}
    found = ((key, several) for key, (section, several) in sections.items() if section is not None and name in section.model_fields)
    return [f"{key}.0.{name}" if several else f"{key}.{name}" for key, several in found]


def _model_in(annotation: Any) -> Any:
    """Find the section within a type: `tuple[Stage, ...]`, `LayerwiseFit | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(argument) for argument in getattr(annotation, "__args__", ()))
    return next((section for section in found if section is not None), None)


def _name(key: Key) -> str:
    return ".".join(map(str, key))
