"""What was measured of a model: `measured.json`, beside the run's own files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from edit_compile.files import write_text
from edit_compile.frozen import Frozen
from edit_compile.version import __version__

MEASURED = "measured.json"


class Measure(Frozen):
    """One kind of measurement: its numbers by name, or why there are none."""

    settings: dict[str, Any] = Field(default_factory=dict)
    """What the numbers depend on besides the model; where they differ, it is measured again."""
    values: dict[str, float] = Field(default_factory=dict)
    reason: str | None = None
    """Why it does not apply."""


class Measured(Frozen):
    """All that was measured of a model, by kind: error, training, parameters, flops, adherence, frechet, latency."""

    version: Literal[1] = 1
    package_version: str = __version__
    measures: dict[str, Measure] = Field(default_factory=dict)

    def has(self, kind: str, settings: Mapping[str, Any]) -> bool:
        """Tell whether a kind was measured with these settings."""
        return kind in self.measures and self.measures[kind].settings == settings

    def with_measure(self, kind: str, measure: Measure) -> Measured:
        """Return the same with one kind measured."""
        return Measured(measures={**self.measures, kind: measure})

    def numbers(self) -> dict[str, float]:
        """Return all numbers as KIND.NAME."""
        return {f"{kind}.{name}": value for kind, measure in self.measures.items() for name, value in measure.values.items()}

    def reasons(self) -> dict[str, str]:
        """Return why kinds have no numbers."""
        return {kind: measure.reason for kind, measure in self.measures.items() if measure.reason is not None}


def read_measured(folder: Path) -> Measured:
    """Read what was measured of a model; nothing if the file is not there, or of another version: then all is measured again."""
    try:
        return Measured.model_validate_json((folder / MEASURED).read_text())
    except (OSError, ValidationError):
        return Measured()


def write_measured(folder: Path, measured: Measured) -> None:
    """Write `measured.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / MEASURED, measured.model_dump_json(indent=2))
