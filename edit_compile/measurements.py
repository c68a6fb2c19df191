"""What was measured of this machine: kept in the user's cache folder, by what it holds for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from edit_compile.files import read_small, write_text
from edit_compile.frozen import Frozen

Measured = TypeVar("Measured", bound=Frozen)


def keep_measurement(kind: str, conditions: Mapping[str, Any], measured: Frozen) -> None:
    """Keep a measurement; without a home, or in one that cannot be written, it is measured again next time.

    Args:
        kind: of measurement, a word.
        conditions: what it holds for.
    """
    with suppress(OSError, RuntimeError):
        path = _file(kind, conditions)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, measured.model_dump_json(indent=2))


def kept_measurement(kind: str, conditions: Mapping[str, Any], form: type[Measured]) -> Measured | None:
    """Read a measurement; None if there is none under these conditions, or it cannot be read.

    Args:
        kind, conditions: as of `keep_measurement`.
    """
    try:
        return form.model_validate_json(read_small(_file(kind, conditions)))
    except (OSError, RuntimeError, ValidationError):
        return None


def _file(kind: str, conditions: Mapping[str, Any]) -> Path:
    """Return a measurement's file in $XDG_CACHE_HOME/edit_compile.

    Raises:
        RuntimeError: the user has no home.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edit_compile"
    return folder / f"{kind}-{hashlib.sha256(repr(conditions).encode()).hexdigest()[:16]}.json"
