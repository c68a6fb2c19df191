"""Model families by the name of their class: adapters are the only place where names decide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

Entry = TypeVar("Entry")


def of_family(model: nn.Module, entries: Mapping[str, Entry]) -> Entry | None:
    """The entry of the model's class, or of the nearest one that it derives from: converted models derive from their own."""
    return next((entries[base.__name__] for base in type(model).__mro__ if base.__name__ in entries), None)
