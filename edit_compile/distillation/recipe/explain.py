"""A recipe with all of its keys, and above each what it means."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel

from edit_compile.distillation.recipe.schema import Recipe

_WIDTH = 100


def explain(recipe: Recipe) -> str:
    """Write a recipe in YAML with every key, also those that have their default, and a comment above each; it reads as the same recipe."""
    return "\n".join(_keys(recipe, recipe.model_dump(mode="json"), "", set())) + "\n"


def _keys(model: BaseModel, dumped: dict[str, Any], indent: str, explained: set[str]) -> Iterator[str]:
    """Yield the lines of a section; what was explained before is not again."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        where = f"{type(model).__name__}.{name}"
        if where not in explained and field.description:
            yield from _comment(field.description, indent)
        explained.add(where)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _keys(value, dumped[name], f"{indent}  ", explained)
        elif isinstance(value, tuple) and value and all(isinstance(each, BaseModel) for each in value):
            yield f"{indent}{name}:"
            for each, content in zip(value, dumped[name], strict=True):
                yield f"{indent}-"
                yield from _keys(each, content, f"{indent}  ", explained)
        else:
            yield f"{indent}{name}: {_value(dumped[name])}"


def _value(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).removesuffix("\n").removesuffix("\n...")


def _comment(text: str, indent: str) -> Iterator[str]:
    start = f"{indent}# "
    yield from textwrap.wrap(" ".join(text.split()), _WIDTH, initial_indent=start, subsequent_indent=start)
