"""The folder of a ranking: what is finished in it, and what it was begun with. Every file is written at once or not at all."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from edit_compile.adapters.family import Extent
from edit_compile.distillation.ranking.ranking import DesignCandidate, Ranking
from edit_compile.distillation.recipe.schema import FREE, Recipe, changed_keys, flatten
from edit_compile.errors import ConfigError, DistillError
from edit_compile.files import write_text
from edit_compile.frozen import Frozen, dump_except, first_problem
from edit_compile.student.checkpoint import INDEX
from edit_compile.version import __version__

FORMAT = 1


class Settings(Frozen):
    """What all measurements of a folder have in common."""

    version: int = FORMAT
    package_version: str = __version__
    recipe: dict[str, Any]
    weights: str
    """A hash of the model's fingerprint."""


class ErrorSums(Frozen):
    """Errors that are being measured: what is summed over the batches so far, by site and bin of timesteps."""

    batches: int = 0
    """How many are in the sums."""
    sums: dict[str, tuple[tuple[float, float, float, float], ...]] = Field(default_factory=dict)
    """As of `validation.error_sums`."""


class Costs(Frozen):
    """FLOPs of one forward at a size."""

    image_tokens: int
    text_tokens: int | None
    total: int
    """Of the model as it is."""
    saved: dict[str, int]
    """By each site."""


class Times(Frozen):
    """Seconds of one forward at a size."""

    total: float
    """Of the model as it is."""
    saved: dict[str, float]
    """By each site."""


Data = TypeVar("Data", bound=Frozen)


@dataclass(frozen=True)
class RankingFolder:
    """`ranking.json`, `ranking.md`, `pareto.png`, and in `fits/` and `chosen/` fitted students."""

    path: Path

    @property
    def ranking(self) -> Path:
        """The file of the ranking."""
        return self.path / "ranking.json"

    def chosen(self, sites: str) -> Path:
        """Return the folder of the student that a budget chooses."""
        return self.path / "chosen" / _slug(sites.replace("<=", ""))

    def candidate(self, candidate: DesignCandidate) -> CandidateFolder:
        """Return the folder of a candidate's fit and measurements."""
        options = hashlib.sha256(json.dumps(candidate.options, sort_keys=True).encode()).hexdigest()[:6]
        return CandidateFolder(
            self.path / "fits" / (f"{_slug(candidate.design)}-{options}" if candidate.options else _slug(candidate.design))
        )

    def open(self, recipe: Recipe, weights: str) -> None:
        """Begin a ranking in the folder, or see that it was begun with the same recipe and weights.

        Raises:
            DistillError: it was begun otherwise, or cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise DistillError(f"{self.path} is a file; a ranking needs a folder")
        file, (mark,) = self.path / "settings.json", FREE
        content = dump_except(recipe, mark)
        if (begun := _read(file, Settings)) is None:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                write_text(file, Settings(recipe=content, weights=weights).model_dump_json(indent=2))
            except OSError as error:
                raise DistillError(f"{self.path} cannot be written: {error.strerror}") from None
            return
        now, then = flatten(content), flatten(begun.recipe)
        different = changed_keys(then, now)
        if different or begun.weights != weights:
            changes = ", ".join(f"{key} ({then.get(key)} then, {now.get(key)} now)" for key in different[:3]) or "another model's weights"
            raise DistillError(f"{self.path} has a ranking begun with other settings: {changes}; rank as then, or choose another folder")

    def previous(self) -> Ranking | None:
        """Return the ranking that the folder holds already; None if there is none that can be read."""
        try:
            return Ranking.read(self.ranking)
        except ConfigError:
            return None


@dataclass(frozen=True)
class CandidateFolder:
    """What is known of one candidate: the fitted student, and what was measured of it."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints of a fit that is not finished."""
        return self.path / "checkpoints"

    @property
    def fitted(self) -> bool:
        """Whether the fit is finished."""
        return (self.path / INDEX).is_file()

    def errors(self) -> ErrorSums:
        """Return the errors measured so far."""
        return _read(self.path / "errors.json", ErrorSums) or ErrorSums()

    def costs(self, size: Extent) -> Costs | None:
        """Return the FLOPs at a size, if they were counted."""
        return _read(self._at("flops", size), Costs)

    def times(self, size: Extent) -> Times | None:
        """Return the seconds at a size, if they were measured."""
        return _read(self._at("seconds", size), Times)

    def write(self, found: ErrorSums | Costs | Times, size: Extent = ()) -> None:
        """Write what was measured."""
        kinds = {ErrorSums: self.path / "errors.json", Costs: self._at("flops", size), Times: self._at("seconds", size)}
        write_text(kinds[type(found)], found.model_dump_json(indent=2))

    def _at(self, what: str, size: Extent) -> Path:
        return self.path / f"{what}-{'x'.join(map(str, size))}.json"


def _slug(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text).strip("-")


def _read(path: Path, kind: type[Data]) -> Data | None:
    """Read a file of the folder; None if there is none.

    Raises:
        DistillError: it is damaged.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DistillError(f"{path} is damaged: {first_problem(error)}; remove it, and what it holds is measured again") from None
