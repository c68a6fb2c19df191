"""The base of plain data: recipes, options, plans, and the JSON of checkpoints."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class Frozen(BaseModel):
    """Immutable data in which unknown keys are errors.

    A string below a field is the field's description, in the source as in the JSON schema.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="constants")


def first_problem(error: ValidationError) -> str:
    """Describe the first of a validation's errors in words: `key.of.field: what is wrong`."""
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"


def dump_except(model: BaseModel, mark: str) -> dict[str, Any]:
    """Dump a model as JSON data without the fields marked `Field(json_schema_extra={mark: "free"})`, at any depth."""
    fields = type(model).model_fields
    kept = {name for name, field in fields.items() if not (isinstance(field.json_schema_extra, dict) and mark in field.json_schema_extra)}
    return {name: _dump(getattr(model, name), value, mark) for name, value in model.model_dump(mode="json", include=kept).items()}


def _dump(value: Any, dumped: Any, mark: str) -> Any:
    if isinstance(value, BaseModel):
        return dump_except(value, mark)
    if isinstance(value, list | tuple):
        return [_dump(one, other, mark) for one, other in zip(value, dumped, strict=True)]
    return dumped
