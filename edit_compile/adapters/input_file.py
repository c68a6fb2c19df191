"""Example inputs written down in a YAML file: the keyword arguments of one forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field, NonNegativeInt, ValidationError
from torch import Tensor

from edit_compile.errors import ConfigError
from edit_compile.frozen import Frozen, first_problem
from edit_compile.yaml_text import parse_yaml, read_text

_KNOWN = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _KNOWN}


class _TensorOf(Frozen):
    """`{shape: [2, 16, 24, 40], dtype: float32, fill: 0}`."""

    shape: list[NonNegativeInt] = Field(min_length=0)
    dtype: str = "float32"
    fill: float = 0.0


def read_example_inputs(path: Path) -> dict[str, Any]:
    """Read the keyword arguments of one forward.

    `{shape: [...], dtype: ..., fill: ...}` stands for a tensor (default: float32 zeros), `{values: [[...]]}` for one with these
    values, such as position ids; everything else is passed as it is written, lists and mappings of these too.

    Raises:
        ConfigError: the file cannot be read, or something in it is none of these; says where.
    """
    try:
        content = parse_yaml(read_text(path))
    except ValueError as error:
        raise ConfigError(f"{path} {error}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigError(f"{path} must map the forward's arguments to what they are, for example x: {{shape: [2, 4, 12, 20]}}")
    return {name: _value(value, f"{path}: {name}") for name, value in content.items()}


def _value(written: Any, where: str) -> Any:
    if isinstance(written, list):
        return [_value(part, f"{where}[{index}]") for index, part in enumerate(written)]
    if not isinstance(written, dict):
        return written
    if "shape" in written:
        return _empty(written, where)
    if written.keys() == {"values"}:
        return _filled(written["values"], where)
    return {name: _value(part, f"{where}.{name}") for name, part in written.items()}


def _empty(written: dict[str, Any], where: str) -> Tensor:
    try:
        wanted = _TensorOf.model_validate(written)
    except ValidationError as error:
        raise ConfigError(f"{where}.{first_problem(error)}") from None
    if wanted.dtype not in _DTYPES:
        raise ConfigError(f"{where}: unknown dtype {wanted.dtype!r}; there are: {', '.join(_DTYPES)}")
    return torch.full(wanted.shape, wanted.fill, dtype=_DTYPES[wanted.dtype])


def _filled(values: Any, where: str) -> Tensor:
    try:
        return torch.tensor(values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}.values: {error}") from None
