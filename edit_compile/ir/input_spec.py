"""Example inputs as data: shapes, dtypes and constants, enough to capture a model again on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edit_compile.errors import PlanError


def encode(value: Any) -> Any:
    """Describe (nested) arguments as JSON.

    Raises:
        PlanError: a value cannot be described.
    """
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, dict):
        if other := [key for key in value if not isinstance(key, str)]:
            raise PlanError(f"dicts among the inputs have strings for keys, not {other[0]!r}")
        return {"dict": {k: encode(v) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        return {"list" if isinstance(value, list) else "tuple": [encode(v) for v in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise PlanError(f"inputs may hold tensors, numbers, strings, lists and dicts, not {type(value).__name__}")


def decode(description: Any) -> Any:
    """Make the arguments again, tensors on the meta device.

    Raises:
        PlanError: it is not a description.
    """
    try:
        ((kind, content), *rest) = description.items()
        if kind == "tensor":
            return torch.empty(content, dtype=getattr(torch, rest[0][1]), device="meta")
        if kind == "dict":
            return {k: decode(v) for k, v in content.items()}
        if kind in ("list", "tuple"):
            items = [decode(v) for v in content]
            return items if kind == "list" else tuple(items)
        if kind == "value":
            return content
    except (AttributeError, ValueError, TypeError, IndexError, RuntimeError, OverflowError):  # too deep, or sizes that none can have
        pass
    raise PlanError(f"not a description of example inputs: {str(description)[:80]}")
