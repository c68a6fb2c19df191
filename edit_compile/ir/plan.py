"""Plans: for every attention site, what will be done or why it is kept. Plain data that is printed, saved, loaded, compared."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from edit_compile.config import LinearizeConfig
from edit_compile.errors import PlanError
from edit_compile.ir.tokens import Grid, TokenKind, TokenLayout

PLAN_VERSION = 1


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SitePlan(_Data):
    """One attention computation: where it is, which tokens take part, what is done and why.

    Attributes:
        path: the module that holds the attention and its projections.
        index: which of the attentions inside that module, in order of execution.
        action: a design's name, or "keep".
        reason: why, in words.
        query_layout, key_layout: the segments along the query's and the key's token axis.
        grid: the image tokens' grid, if known.
        query_sizes, key_sizes: the segments' lengths in the example that was captured.
    """

    path: str
    index: int = 0
    action: str
    reason: str
    query_layout: TokenLayout
    key_layout: TokenLayout
    grid: Grid | None = None
    query_sizes: tuple[int, ...] = ()
    key_sizes: tuple[int, ...] = ()

    @property
    def rewritten(self) -> bool:
        return self.action != "keep"


class SizesOfInputs(_Data):
    """The grid follows from the sizes of the model's inputs: expressions over `symbols`, each an input's dimension."""

    kind: Literal["sizes"] = "sizes"
    expressions: tuple[str, ...]
    symbols: dict[str, tuple[str, int]]


class PositionIds(_Data):
    """The grid is read from an input of position ids (N, D): its last two columns are row and column."""

    kind: Literal["ids"] = "ids"
    input: str


class Given(_Data):
    """The grid cannot be derived: the caller states it with `edit_compile.grid(model, height, width)`.

    `tokens` is the number of image tokens that it is checked against, an expression over `symbols`, if that is known.
    """

    kind: Literal["given"] = "given"
    tokens: str | None = None
    symbols: dict[str, tuple[str, int]] = {}


class Plan(_Data):
    """The plan of a whole model. `inputs` describes the example inputs (shapes, dtypes, constants) it was made with."""

    version: int = PLAN_VERSION
    model: str
    config: LinearizeConfig
    sites: tuple[SitePlan, ...]
    grid: SizesOfInputs | PositionIds | Given
    inputs: dict[str, Any]

    @property
    def rewritten(self) -> tuple[SitePlan, ...]:
        return tuple(site for site in self.sites if site.rewritten)

    def __str__(self) -> str:
        """A line for the model and one for every site."""
        width = max(len(site.path) for site in self.sites)
        lines = [f"  {site.path:{width}}  {site.action:8}{site.query_layout}  {site.reason}" for site in self.sites]
        return "\n".join([f"{self.model}: {len(self.rewritten)} of {len(self.sites)} attention sites rewritten", *lines])

    def to_json(self) -> str:
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan.

        Raises:
            PlanError: it is not one, or of a version this release does not know.
        """
        try:
            plan = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            raise PlanError(f"not a plan: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        if plan.version != PLAN_VERSION:
            raise PlanError(f"the plan has version {plan.version}, this release reads version {PLAN_VERSION}")
        return plan


def has_image(layout: TokenLayout) -> bool:
    return layout.has(TokenKind.IMAGE)
