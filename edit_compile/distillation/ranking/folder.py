"""The folder of a ranking: what is finished in it, and what it was begun with. Every file is written at once or not at all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from edit_compile.adapters.family import Extent
from edit_compile.distillation.ranking.ranking import DesignCandidate
from edit_compile.distillation.recipe.schedule import phases_of
from edit_compile.distillation.recipe.schema import FREE, Recipe, changes_in_words, flatten
from edit_compile.errors import DistillError
from edit_compile.files import sha256, write_text
from edit_compile.frozen import Frozen, dump_except, first_problem
from edit_compile.ir.plan import Plan
from edit_compile.student.checkpoint import INDEX
from edit_compile.student.checkpoint_format import read_index
from edit_compile.version import __version__, made_by_another

_DECIDING = (  # the keys of a recipe that measurements depend on, besides what `measured_by` adds
    "model",
    "prediction",
    "train",
    "timesteps",
    "data",
    "layerwise",
    "optimizer",
    "max_grad_norm",
    "spike_factor",
    "validation",
    "precision",
    "seed",
)


class Settings(Frozen):
    """What all measurements of a folder have in common."""

    package_version: str = __version__
    recipe: dict[str, Any]
    """What of it decides; see `measured_by`."""
    weights: str
    """A hash of the model's fingerprint."""


def measured_by(recipe: Recipe) -> dict[str, Any]:
    """Return all of a recipe that the measurements of a ranking depend on."""
    (mark,) = FREE
    content, phase = dump_except(recipe, mark), phases_of(recipe)[0]
    size = {"resolution": [phase.height, phase.width], "frames": phase.frames}
    validation = {key: value for key, value in content["validation"].items() if key != "resolutions"}
    sites = {key: content["convert"][key] for key in ("include", "exclude")}
    kept = {key: content[key] for key in _DECIDING}
    return kept | {"layerwise": content["layerwise"] | size, "validation": validation, "convert": sites}


class ErrorSums(Frozen):
    """Errors that are being measured: what is summed over the batches so far, by site and bin of timesteps."""

    fit: str
    """The identity of the fitted student."""
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

    machine: str
    """On which they were measured, in words."""
    total: float
    """Of the model as it is."""
    saved: dict[str, float]
    """By each site."""


class SetError(Frozen):
    """The error with some sites converted at once."""

    converted: dict[str, str]
    """By path, the identity of the fitted student whose weights the site has."""
    measured: float


class SetErrors(Frozen):
    """All sets that were measured."""

    found: tuple[SetError, ...] = ()

    def of(self, converted: Mapping[str, str]) -> float | None:
        """Return the error of a set, if it was measured."""
        return next((each.measured for each in self.found if each.converted == converted), None)


Data = TypeVar("Data", bound=Frozen)


@dataclass(frozen=True)
class RankingFolder:
    """`ranking.json`, `ranking.md`, `pareto.png`, and in `fits/` and `chosen/` fitted students."""

    path: Path

    @property
    def ranking(self) -> Path:
        """The file of the ranking."""
        return self.path / "ranking.json"

    @property
    def page(self) -> Path:
        """The ranking as a page."""
        return self.path / "ranking.md"

    @property
    def plot(self) -> Path:
        """The plot of error against FLOPs."""
        return self.path / "pareto.png"

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
        file, content = self.path / "settings.json", measured_by(recipe)
        if (begun := _read(file, Settings)) is None:
            write_text(file, Settings(recipe=content, weights=weights).model_dump_json(indent=2))
            return
        if begun.package_version != __version__:
            raise DistillError(f"{self.path} has a ranking {made_by_another(begun.package_version)}: choose another folder")
        changes = changes_in_words(flatten(begun.recipe), flatten(content))
        changes = changes or ("another model's weights" if begun.weights != weights else "")
        if changes:
            raise DistillError(f"{self.path} has a ranking begun with other settings: {changes}; rank as then, or choose another folder")

    def sets(self) -> SetErrors:
        """Return the errors of sets that were measured."""
        return _read(self.path / "sets.json", SetErrors) or SetErrors()

    def add(self, found: SetError) -> None:
        """Add the error of a set."""
        write_text(self.path / "sets.json", SetErrors(found=(*self.sets().found, found)).model_dump_json(indent=2))


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

    @property
    def fit(self) -> str:
        """The identity of the fitted student."""
        return sha256(self.path / INDEX)[:12]

    def check(self, plan: Plan) -> None:
        """Make sure that the fitted student is of a plan.

        Raises:
            DistillError: the designs have changed since it was fitted.
        """
        then, now = (_converted(each) for each in (Plan.model_validate(read_index(self.path).plan), plan))
        if then != now:
            path = next(path for path in (*now, *then) if now.get(path) != then.get(path))
            raise DistillError(f"{self.path} was fitted with another plan, at {path}: remove it, and it is fitted and measured again")

    def errors(self) -> ErrorSums:
        """Return the errors of the fitted student measured so far."""
        found = _read(self.path / "errors.json", ErrorSums)
        return found if found is not None and found.fit == self.fit else ErrorSums(fit=self.fit)

    def costs(self, size: Extent) -> Costs | None:
        """Return the FLOPs at a size, if they were counted."""
        return _read(self._at("flops", size), Costs)

    def times(self, size: Extent) -> Times | None:
        """Return the seconds at a size, if they were measured."""
        return _read(self._at("seconds", size), Times)

    def write(self, found: ErrorSums | Costs | Times, size: Extent = ()) -> None:
        """Write what was measured."""
        self.path.mkdir(parents=True, exist_ok=True)
        kinds = {ErrorSums: self.path / "errors.json", Costs: self._at("flops", size), Times: self._at("seconds", size)}
        write_text(kinds[type(found)], found.model_dump_json(indent=2))

    def _at(self, what: str, size: Extent) -> Path:
        return self.path / f"{what}-{'x'.join(map(str, size))}.json"


def _converted(plan: Plan) -> dict[str, tuple[str, dict[str, Any]]]:
    dumped = ((site.path, site.model_dump(mode="json", include={"action", "options"})) for site in plan.rewritten)
    return {path: (site["action"], site["options"]) for path, site in dumped}


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
