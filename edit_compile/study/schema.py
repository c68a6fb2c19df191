"""Studies as plain data: what is compared, at which budget, and what is measured."""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from edit_compile.frozen import Frozen

KEPT_IMAGES = 16  # of every model, for galleries


def _extent(value: object) -> object:
    return (value, value) if isinstance(value, int) else value


def _named(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._+=,-]*", name) or name.endswith((" ", ".")):
        raise ValueError(
            "a name is made of letters, digits, spaces and ._+=,- and begins with a letter or digit: a folder is called like it"
        )
    return name


Size = Annotated[
    tuple[PositiveInt, ...],
    BeforeValidator(_extent, json_schema_input_type=PositiveInt | list[PositiveInt]),
    Field(min_length=2, max_length=3),
]
Name = Annotated[str, AfterValidator(_named)]


class CellBudget(Frozen):
    """What every configuration may spend on training, the layerwise fit included."""

    steps: PositiveInt | None = None
    """Steps of all phases together; each phase gets as large a share of them as its recipe's steps are."""
    seconds: PositiveFloat | None = None
    """Of training. Each configuration is timed in short runs beforehand, in turns, and gets the steps that take as long."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError("give either steps or seconds")
        return self


class Measures(Frozen):
    """What is measured of every model, besides its error."""

    samples: NonNegativeInt = 100
    """Images or videos that a demo model draws of held-out captions, for prompt adherence and the Frechet distance; 0 for none."""
    sampling_steps: PositiveInt = 25
    """Of each of them."""
    flops: tuple[Size, ...] | None = None
    """Sizes at which the FLOPs of one forward are counted: one side in pixels, [height, width] or [frames, height, width].
    Default: that of the last stage."""
    gallery: Annotated[int, Field(ge=0, le=KEPT_IMAGES)] = 6
    """Rows of the gallery, a held-out caption each; 0 for none."""


class Latency(Frozen):
    """How the time of one forward is measured, teacher and student by turns."""

    sizes: tuple[Size, ...] = Field(min_length=1)
    """One side in pixels, [height, width] or [frames, height, width]."""
    runs: PositiveInt = 15
    """Timed calls of each."""


class Study(Frozen):
    """Configurations of one model, to be compared over the same seeds at the same budget."""

    recipe: str
    """The recipe that all share: a shipped one's name, or a file, relative to the study's."""
    change: dict[str, Any] = Field(default_factory=dict, alias="set")
    """Changes of the recipe for all configurations, nested or as dotted keys."""
    configurations: dict[Name, dict[str, Any]] = Field(min_length=1)
    """By name, the changes of the recipe that make each. Paths in them are relative to the working directory."""
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0, 1, 2), min_length=1)
    """Each configuration is distilled once with each."""
    budget: CellBudget | None = None
    """Default: as each recipe says."""
    measure: Measures = Measures()
    """What is measured."""
    latency: Latency | None = None
    """Only where this is given is time measured: on a busy machine it says nothing."""
    untrained: bool | tuple[Name, ...] = False
    """Whether to measure converted models before training too, or of which configurations."""

    @model_validator(mode="before")
    @classmethod
    def _no_changes(cls, given: Any) -> Any:
        """Let a name without anything after it stand for the recipe as it is."""
        if isinstance(given, dict) and isinstance(given.get("configurations"), dict):
            return {**given, "configurations": {name: change or {} for name, change in given["configurations"].items()}}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [name.lower() for name in self.configurations]
        twice = next((name for name in self.configurations if names.count(name.lower()) > 1), None)
        if twice is not None:
            raise ValueError(f"configurations: {twice!r} and another differ in case only; not every file system tells them apart")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: each can be given once")
        unknown = [name for name in self.untrained_names if name not in self.configurations]
        if unknown:
            raise ValueError(f"untrained: no configuration is called {unknown[0]!r}")
        return self

    @property
    def untrained_names(self) -> tuple[str, ...]:
        """The configurations that are measured before training too."""
        return tuple(self.configurations) * self.untrained if isinstance(self.untrained, bool) else self.untrained
