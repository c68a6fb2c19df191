"""What a plan consists of: its sites, where the grid comes from, what the passes did. See `plan` for the plan itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt

from edit_compile.frozen import Frozen
from edit_compile.ir.tokens import Grid, TokenLayout

PLAN_VERSION = 2
KEEP = "keep"

SiteKind = Literal["attention", "feed_forward"]
MaskKind = Literal["none", "by_key", "by_query", "bias"]


class _Data(Frozen):
    def __hash__(self) -> int:
        return hash(self.model_dump_json())


class Refusal(_Data):
    """Why a site cannot be rewritten.

    Attributes:
        reason: in words.
        node: the operation that stands in the way, as the graph names it.
        source: the line of the model's source that it comes from, `package/file.py:12 (code)`.
    """

    reason: str
    node: str | None = None
    source: str | None = None


class SitePlan(_Data):
    """One attention computation or feed-forward network: where it is, which tokens take part, what is done and why.

    Attributes:
        path: the module that holds it and its projections.
        index: which of the computations of its kind inside that module, in order of execution.
        action: a design's name, or "keep".
        options: the design's options, all of them.
        reason: why, in words.
        refusal: where something stands in the way, what and where.
        query_layout, key_layout: the segments along the query's and the key's token axis.
        grid: the image tokens' grid, if known: expressions over the symbols of the plan's `grid`.
        query_sizes, key_sizes, grid_sizes: the segments' lengths and the grid in the example that was captured.
        mask: none, the same for all queries, or different from query to query.
        causal: whether a query sees the keys up to its own position only.
    """

    path: str
    index: int = 0
    kind: SiteKind = "attention"
    action: str
    options: dict[str, Any] = Field(default_factory=dict)
    reason: str
    refusal: Refusal | None = None
    query_layout: TokenLayout
    key_layout: TokenLayout
    grid: Grid | None = None
    query_sizes: tuple[int, ...] = ()
    key_sizes: tuple[int, ...] = ()
    grid_sizes: tuple[int, ...] = ()
    mask: MaskKind = "none"
    causal: bool = False

    @property
    def rewritten(self) -> bool:
        return self.action != KEEP

    def kept(self, reason: str, refusal: Refusal | None = None) -> SitePlan:
        """Return the same site, kept for a reason."""
        return self.model_copy(update={"action": KEEP, "options": {}, "reason": reason, "refusal": refusal})


SizeAt = tuple[str, int | None]  # an input, as a call reads it, and its dimension; None for an input that is a number


class SizesOfInputs(_Data):
    """The grid follows from the sizes of the model's inputs, or from numbers among them.

    Attributes:
        expressions: the model's finest grid, over `symbols`; a site on another one has expressions of its own.
        symbols: where each symbol is read: `x` and its dimension, or `height` or `shapes[0][1]` for a number.
        images: a sequence of numbers among the inputs that holds one image's sizes, or a sequence of such sequences, one for each
            image; the symbols below it are read in every one.
        samples: groups of inputs, tensors or lists of them, that hold the images of one batch: in a call all of a group have one size.
    """

    kind: Literal["sizes"] = "sizes"
    expressions: tuple[str, ...] = Field(min_length=2, max_length=3)
    symbols: dict[str, SizeAt]
    images: str | None = None
    samples: tuple[tuple[str, ...], ...] = ()


class PositionIds(_Data):
    """The grid is read from an input of position ids, (N, D) or (B, N, D); of several images, the grid of each.

    Attributes:
        input: the ids, as a call reads them.
        tokens_last: whether they are (D, N) or (B, D, N).
        rows_and_columns: which columns of the ids count rows and columns, if the example tells.
        before: the number of other tokens whose ids come first, an expression over `symbols`.
        tokens: the number of image tokens among those that have ids; None for all of them.
        symbols: where each symbol is read.
    """

    kind: Literal["ids"] = "ids"
    input: str
    tokens_last: bool = False
    rows_and_columns: tuple[int, int] | None = None
    before: str = "0"
    tokens: str | None = None
    symbols: dict[str, SizeAt] = Field(default_factory=dict)


class Given(_Data):
    """The grid cannot be derived: the caller states it with `edit_compile.grid(model, height, width)`.

    `tokens` is the number of image tokens that it is checked against, an expression over `symbols`, if that is known.
    """

    kind: Literal["given"] = "given"
    tokens: str | None = None
    symbols: dict[str, SizeAt] = Field(default_factory=dict)


GridSource = Annotated[SizesOfInputs | PositionIds | Given, Field(discriminator="kind")]


class PassRecord(_Data):
    """What a pass did.

    Attributes:
        name: of the pass.
        graph: "model", or the path of the first site of its structure.
        count: of what the pass is named for.
        nodes: in the graph after it.
    """

    name: str
    graph: str
    count: int
    nodes: int


class PlanData(_Data):
    """The content of a plan.

    Attributes:
        model: its class.
        sites: in order of execution.
        grid: where the image tokens' grid comes from in each call.
        inputs: describes the example inputs (shapes, dtypes, constants) it was made with.
        passes: those that made it, over the model's graph and over the graph of every distinct site.
        min_tokens: the number of image tokens below which a converted model runs as the original; 0 for never.
    """

    version: int = PLAN_VERSION
    model: str
    sites: tuple[SitePlan, ...]
    grid: GridSource
    inputs: dict[str, Any]
    passes: tuple[PassRecord, ...] = ()
    min_tokens: NonNegativeInt = 0

    @property
    def rewritten(self) -> tuple[SitePlan, ...]:
        return tuple(site for site in self.sites if site.rewritten)
