"""The base of a recipe's sections."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Plain data: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")
