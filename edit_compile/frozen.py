"""The base of a recipe's sections; nested content as a flat mapping."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Plain data: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping from dotted keys to values."""
    if not isinstance(content, dict | list):
        return {prefix.removesuffix("."): content}
    items = content.items() if isinstance(content, dict) else enumerate(content)
    return {k: v for name, value in items for k, v in flat(value, f"{prefix}{name}.").items()}
