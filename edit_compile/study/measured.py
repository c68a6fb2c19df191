"""What was measured of a model: `measured.json`, beside the run's own files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from edit_compile.files import sha256, write_text
from edit_compile.frozen import Frozen
from edit_compile.student.checkpoint import INDEX
from edit_compile.version import __version__

MEASURED = "measured.json"
Wanted = Mapping[str, Mapping[str, Any]]  # the settings of each kind of measurement that is asked for


class Measurement(Frozen):
    """One kind of measurement: its numbers by name, or why there are none."""

    settings: dict[str, Any] = Field(default_factory=dict)
    """What the numbers depend on besides the model; where they differ, it is measured again."""
    values: dict[str, float] = Field(default_factory=dict)
    reason: str | None = None
    """Why it does not apply."""
    package_version: str = __version__
    """Of the package that measured it."""


class Measurements(Frozen):
    """All that was measured of a model, by kind: error, training, parameters, flops, adherence, frechet, gallery, latency."""

    version: Literal[2] = 2
    model: str
    """The identity of the model that was measured; of another one in the same place, all is measured anew."""
    measures: dict[str, Measurement] = Field(default_factory=dict)

    def has(self, kind: str, settings: Mapping[str, Any]) -> bool:
        """Tell whether a kind was measured with these settings."""
        return kind in self.measures and self.measures[kind].settings == settings

    def lacks(self, wanted: Wanted) -> list[str]:
        """List the kinds that are wanted and were not measured with these settings."""
        return [kind for kind, settings in wanted.items() if not self.has(kind, settings)]

    def only(self, wanted: Wanted) -> Measurements:
        """Select what is wanted. A kind that was measured with other settings has no numbers, and this as the reason."""
        other = Measurement(reason="measured with other settings; compare again")
        kept = {kind: self.measures[kind] if self.has(kind, wanted[kind]) else other for kind in wanted if kind in self.measures}
        return self.model_copy(update={"measures": kept})

    def with_measure(self, kind: str, measure: Measurement) -> Measurements:
        """Return the same with one kind measured."""
        return self.model_copy(update={"measures": {**self.measures, kind: measure}})

    def numbers(self) -> dict[str, float]:
        """Return all numbers as KIND.NAME."""
        return {f"{kind}.{name}": value for kind, measure in self.measures.items() for name, value in measure.values.items()}

    def reasons(self) -> dict[str, str]:
        """Return why kinds have no numbers."""
        return {kind: measure.reason for kind, measure in self.measures.items() if measure.reason is not None}


def identity_of_run(folder: Path) -> str:
    """Tell the student in a folder apart from others that may have been or come there; "" if there is none."""
    return sha256(folder / INDEX) if (folder / INDEX).is_file() else ""


def read_measured(folder: Path, model: str) -> Measurements:
    """Read what was measured of a model; nothing if no file is there, or one of another model or version: then all is measured again."""
    try:
        found = Measurements.model_validate_json((folder / MEASURED).read_bytes())
    except (OSError, ValueError):
        return Measurements(model=model)
    return found if found.model == model else Measurements(model=model)


def write_measured(folder: Path, measured: Measurements) -> None:
    """Write `measured.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / MEASURED, measured.model_dump_json(indent=2))
