"""Rankings: what converting each site costs and saves, as `ranking.json` holds it; and the configuration that a budget makes of it."""

from __future__ import annotations

import json
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from edit_compile.config import LinearizeConfig, Rule, parse_options
from edit_compile.designs import AUTO, AUTOMATIC_OPTIONS, KEEP, find_design
from edit_compile.distillation.ranking.budget import parse_budget
from edit_compile.distillation.ranking.choose import Choices, Selection
from edit_compile.errors import ConfigError, EditCompileError
from edit_compile.frozen import Frozen, first_problem
from edit_compile.ir.plan import SiteKind
from edit_compile.version import __version__, made_by_another

FORMAT = 2
_Finite = Field(allow_inf_nan=False)


class DesignCandidate(Frozen):
    """A design that competes for the sites."""

    design: str = AUTO
    """A design's name, "auto" or "fast"."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the design."""

    def config(self, include: tuple[str, ...] = ("*",), exclude: tuple[str, ...] = ()) -> LinearizeConfig:
        """Return the configuration that converts every site it takes."""
        return LinearizeConfig(design=self.design, options=self.options, include=include, exclude=exclude)

    @property
    def brings(self) -> tuple[str, ...]:
        """The designs that it brings for sites of another kind, which do not compete."""
        if self.design in AUTOMATIC_OPTIONS:
            return ()
        design = find_design(self.design)
        return tuple(other.name for other, _ in design.companions(parse_options(design, self.options)))

    @property
    def kinds(self) -> set[str]:
        """The kinds of the sites that it competes for: not those of the designs that it brings."""
        return {"attention"} if self.design in AUTOMATIC_OPTIONS else {find_design(self.design).kind}

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.design} ({options})" if options else self.design


class Measure(Frozen):
    """A site converted by a candidate, all others as they were."""

    candidate: NonNegativeInt
    """Its number among the ranking's candidates."""
    design: str
    """The design that takes the site."""
    options: dict[str, Any]
    """All of the design's."""
    error: Annotated[NonNegativeFloat, _Finite]
    """Of the model's output: sum |student - teacher|^2 / sum |teacher - mean|^2 on samples that the fit never saw."""
    bins: tuple[Annotated[NonNegativeFloat, _Finite], ...]
    """The same over ranges of timesteps, the smallest first."""
    saved_flops: int
    """Fewer FLOPs of one forward; less than 0 if it costs more."""
    saved_seconds: Annotated[float, _Finite] | None = None
    """Less time of one forward, if it was measured."""


class RankedSite(Frozen):
    """One site."""

    path: str
    kind: SiteKind = "attention"
    measures: tuple[Measure, ...] = ()
    """By candidate; none for a candidate that does not take the site."""
    reason: str = ""
    """Where no candidate takes it, why."""


class CheckedSet(Frozen):
    """A set of sites converted together, as fitted, and what the sum over its sites had predicted."""

    sites: str
    """The budget."""
    converted: dict[str, NonNegativeInt]
    """The candidate of each converted site, by path."""
    flops: NonNegativeInt
    """Of one forward, predicted: the model's less what its sites save."""
    predicted: Annotated[NonNegativeFloat, _Finite]
    """The sum of its sites' errors."""
    measured: Annotated[NonNegativeFloat, _Finite]
    """The error with all of them converted."""


class Ranking(Frozen):
    """What converting each site of a model does to its output, and saves."""

    version: int = FORMAT
    package_version: str = __version__
    model: str
    """Its name, as of `load_model`."""
    recipe: dict[str, Any]
    """What it was measured with: data, layerwise fit, validation, seed."""
    candidates: tuple[DesignCandidate, ...] = Field(min_length=1)
    size: tuple[PositiveInt, ...] = Field(min_length=2, max_length=3)
    """In pixels, at which FLOPs are counted and time is measured: height and width, after a video's frames."""
    image_tokens: PositiveInt
    """At this size."""
    text_tokens: PositiveInt | None = None
    flops: PositiveInt
    """Of one forward of the model as it is."""
    seconds: Annotated[PositiveFloat, _Finite] | None = None
    """Of one forward of the model as it is, if it was measured."""
    samples: PositiveInt
    """That errors were measured on."""
    sites: tuple[RankedSite, ...] = Field(min_length=1)
    """In order of execution; where there are several kinds, in the order of the model's modules."""
    checked: tuple[CheckedSet, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        paths = [site.path for site in self.sites]
        if twice := next((path for path in paths if paths.count(path) > 1), None):
            raise ValueError(f"the site {twice} is listed twice")
        for site in self.sites:
            numbers = [measure.candidate for measure in site.measures]
            if len(set(numbers)) < len(numbers) or any(number >= len(self.candidates) for number in numbers):
                raise ValueError(f"the measures of {site.path} are not one for each of {len(self.candidates)} candidates at most")
        if any((measure.saved_seconds is None) != (self.seconds is None) for site in self.sites for measure in site.measures):
            raise ValueError("time was measured for some of the sites only")
        return self

    @classmethod
    def read(cls, path: str | Path) -> Ranking:
        """Read a `ranking.json`, or that of a folder.

        Raises:
            ConfigError: there is none, it is damaged, or another version of this package made it.
        """
        path = Path(path)
        path = path / "ranking.json" if path.is_dir() else path
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist; `edit-compile rank MODEL -o {path.parent}` writes it") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not a ranking: {error}") from None
        if not isinstance(content, dict):
            raise ConfigError(f"{path} is not a ranking: it is a {type(content).__name__}")
        if content.get("version", FORMAT) != FORMAT:
            raise ConfigError(f"{path} was {made_by_another(content.get('package_version'))}; rank the model again")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ConfigError(f"{path} is not a ranking: {first_problem(error)}") from None

    @cached_property
    def choices(self) -> Choices:
        """The sites and their candidates as plain numbers."""
        return Choices(self.flops, self.seconds, {site.path: site.measures for site in self.sites})

    def choose(self, sites: str) -> Selection:
        """Choose the sites to convert, and the candidate for each.

        Args:
            sites: `flops <= 0.5x`, `time <= 0.7x` or `error <= 0.01` choose exactly, assuming that errors add: the least sum of errors,
                or the most FLOPs saved. `best N` takes the first N of the ranking, and `all` all sites, each with the candidate that
                has the least error for each FLOP saved; one that saves none, with the least error.

        Raises:
            ConfigError: `sites` is none of these, cannot be reached, or leaves every site as it is.
        """
        return self.choices.choose(parse_budget(sites))

    def config(self, sites: str) -> LinearizeConfig:
        """Make the configuration that converts the chosen sites: a rule for each site, with its rank in the reason.

        Raises:
            ConfigError: as `choose`.
        """
        return self.config_of(self.choose(sites))

    def config_of(self, selection: Selection) -> LinearizeConfig:
        """Make the configuration that converts the sites of a selection."""
        return LinearizeConfig(rules=tuple(self.rules_of(selection).values()))

    def rules_of(self, selection: Selection) -> dict[str, Rule]:
        """Make the rules that convert the sites of a selection, by path."""
        converted = {site.kind for site in self.sites if site.path in selection.converted}
        # A plan lists sites of another kind than attention only if a rule converts some.
        listed = (site for site in self.sites if site.kind == "attention" or site.kind in converted)
        return {site.path: self._rule(site, selection) for site in listed}

    def _rule(self, site: RankedSite, selection: Selection) -> Rule:
        measure, glob = selection.converted.get(site.path), escape(site.path)
        if not site.measures:
            return Rule(glob, KEEP, reason=site.reason)
        said = self.choices.describe(site.path, measure, timed=selection.budget.quantity == "time")
        if measure is None:
            return Rule(glob, KEEP, reason=f"outside the budget ({selection.budget.text}): {said}")
        return Rule(glob, measure.design, measure.options, reason=said, companions=False)  # those were not ranked

    def to_json(self) -> str:
        return self.model_dump_json(indent=2)


def parse_candidates(given: Any) -> tuple[DesignCandidate, ...]:
    """Read a list of candidates: names, or mappings `{design: NAME, option: value}`; "keep" always competes, named or not.

    Raises:
        ConfigError: an entry is neither, names no design, or has options that it does not know.
    """
    entries = given if isinstance(given, list | tuple) else [given]
    found: list[DesignCandidate] = []
    for entry in entries:
        fields = {"design": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, dict) else None
        if fields is None or not isinstance(fields.get("design"), str) or not all(isinstance(name, str) for name in fields):
            raise ConfigError(f"candidates: {entry!r} is neither a design's name nor a mapping like {{design: NAME, option: value}}")
        name = fields.pop("design")
        if name == KEEP and not fields:
            continue
        candidate = DesignCandidate(design=name, options=_options(name, fields))
        if candidate in found:
            raise ConfigError(f"candidates: {candidate} is listed twice")
        found.append(candidate)
    if not found:
        raise ConfigError(f"candidates: name a design beside {KEEP!r}, or nothing competes")
    return tuple(found)


def _options(design: str, fields: dict[str, Any]) -> dict[str, Any]:
    nested = fields.pop("options", {})
    if not isinstance(nested, dict) or not all(isinstance(name, str) for name in nested):
        raise ConfigError(f"candidates: {design}: its options are a mapping from names, not {nested!r}")
    options = {**nested, **fields}
    try:
        if design in AUTOMATIC_OPTIONS:
            LinearizeConfig(design=design, options=options)
        else:
            parse_options(find_design(design), options)
    except EditCompileError as error:
        raise ConfigError(f"candidates: {error}") from None
    return options


def resolve_ranking(given: dict[str, Any]) -> LinearizeConfig:
    """Make the configuration of `{ranking: FILE, sites: BUDGET}`.

    Raises:
        ConfigError: there is no ranking, other keys stand beside it, or the budget cannot be kept.
    """
    rest = {name: value for name, value in given.items() if name not in ("ranking", "sites")}
    if "ranking" not in given:
        budget = parse_budget(given["sites"])
        if budget.quantity == "all":
            return LinearizeConfig(**rest)
        raise ConfigError(f"sites: {budget.text}: needs a ranking, which `edit-compile rank MODEL` makes; give its file as ranking")
    if not isinstance(given["ranking"], str | Path):
        raise ConfigError(f"ranking: {given['ranking']!r} is not the path of a ranking")
    if rest:
        raise ConfigError(f"{next(iter(rest))} beside ranking: the ranking decides on designs and sites; rank the model with it instead")
    return Ranking.read(given["ranking"]).config(given.get("sites", "all"))
