"""What a design is: which sites it takes, what it adds, how it computes, what it costs, and what the audit may hold it to.

The compiler establishes the facts about a `Site`; a design judges them. It is an `nn.Module`: an instance is the module
that one rewritten site gets, so its parameters are what conversion adds there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from edit_compile.designs.ops.parts import Part, Product, total_flops
from edit_compile.designs.ops.token_spans import Grids, aligned, grids_of, image_tokens, in_words, window_counts
from edit_compile.errors import GridError
from edit_compile.frozen import Frozen
from edit_compile.ir.plan import SiteKind
from edit_compile.ir.site import Place, Site

_SIDE = 1024  # of the product that stands for a design's FLOPs of which no parts are known
IMAGE = "image"  # the kind of segment that a grid belongs to; see `TokenKind`


class Verdict(NamedTuple):
    """Whether a design takes a site, and why or why not: the words that `inspect` prints."""

    ok: bool
    reason: str


@dataclass(frozen=True)
class Tap:
    """A module that the compiler calls on the image tokens at a fixed place of a site's graph.

    Attributes:
        where: the place; `Site.channels` has those of the site.
        module: maps (B, C, *grid) to (B, C, *grid') or, if `form` is "tokens", (B, N, C) to (B, N, C).
        stride: by how much it thins each dimension of the grid, n to ceil(n / stride); () for not at all. The compiler samples
            whatever is indexed by token and joins the tap's way (RoPE tables, masks) accordingly. Where the graph does not tell
            the grid's dimensions, the stride is for the last ones: (2, 2) thins rows and columns, of every frame if there are frames.
        form: how the module takes image tokens.
    """

    where: Place
    module: nn.Module
    stride: tuple[int, ...] = ()
    form: Literal["image", "tokens"] = "image"


class Span(NamedTuple):
    """A run of tokens of one kind along a token axis, in one call."""

    kind: str
    start: int
    length: int


class Tokens(NamedTuple):
    """Which tokens are where along a token axis, in one call. Sizes are symbolic while a graph is traced.

    Attributes:
        kinds: of the segments, in order: "image", "text" or "other".
        lengths: of the segments, in tokens.
        grid: of the image tokens, (h, w) or (t, h, w), row-major; () where several images are in the sequence.
        grids: of several images, one after the other.
        keys: the layout of the keys, without taps, where other tokens are among them than among the queries; see `of_keys`.
    """

    kinds: tuple[str, ...]
    lengths: tuple[int, ...]
    grid: tuple[int, ...]
    grids: tuple[tuple[int, ...], ...] = ()
    keys: Tokens | None = None

    @property
    def of_keys(self) -> Tokens:
        """Return the layout of the keys, without taps: that of the queries, unless it is another one."""
        return self if self.keys is None else self.keys

    @property
    def only_image(self) -> bool:
        """Say whether there are image tokens alone."""
        return self.kinds == (IMAGE,)

    def spans(self) -> Iterator[Span]:
        """Yield the segments with their positions."""
        start = 0
        for kind, length in zip(self.kinds, self.lengths, strict=True):
            yield Span(kind, start, length)
            start += length

    def image(self, x: Tensor, dim: int = 2) -> Tensor:
        """Narrow a tensor to its image tokens along `dim`."""
        at = self.kinds.index(IMAGE)
        return x.narrow(dim, sum(self.lengths[:at]), self.lengths[at])

    def others(self, x: Tensor, dim: int = 2) -> Tensor:
        """Take the tokens that are not image tokens along `dim`, in order."""
        at = self.kinds.index(IMAGE)
        before, after = sum(self.lengths[:at]), sum(self.lengths[at + 1 :])
        return torch.cat([x.narrow(dim, 0, before), x.narrow(dim, x.shape[dim] - after, after)], dim)

    def joined(self, image: Tensor, others: Tensor, dim: int = 2) -> Tensor:
        """Put image tokens and others together in the model's order: the inverse of `image` and `others`."""
        at = self.kinds.index(IMAGE)
        before, after = sum(self.lengths[:at]), sum(self.lengths[at + 1 :])
        return torch.cat([others.narrow(dim, 0, before), image, others.narrow(dim, before, after)], dim)

    def thinned(self, stride: Sequence[int]) -> Tokens:
        """Return the layout behind a tap of that stride, () for none."""
        grids = tuple(thinned_grid(grid, stride) for grid in self.grids or (self.grid,))
        image = sum(math.prod(grid) for grid in grids)
        lengths = tuple(image if kind == IMAGE else n for kind, n in zip(self.kinds, self.lengths, strict=True))
        return Tokens(self.kinds, lengths, *_one_or_several(grids))

    def counts(self, stride: Sequence[int], like: Tensor) -> Tensor:
        """Count how many tokens of this layout each token behind a tap of that stride stands for: others for themselves, (M,)."""
        thinned = self.thinned(stride)
        image = torch.cat([window_counts(grid, stride, like) for grid in self.grids or (self.grid,)])
        return thinned.joined(image, image.new_ones(sum(thinned.lengths) - len(image)), 0)


class QKV(NamedTuple):
    """The operands of attention, heads first.

    Attributes:
        query: (B, H, L, D).
        key, value: (B, G, M, D) and (B, G, M, E) with G groups of heads, G = H unless the model has grouped-query attention;
            M < L where a tap thins the image tokens.
        mask: boolean or added to the scores, (B or 1, H or 1, 1, M), or with L in the place of 1 if it differs from query to
            query; None for no mask.
        original: the same query with the model's own key, value and mask, as without taps; None unless the design has `needs_original`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    original: QKV | None = None


class Design(nn.Module, ABC):
    """The base of all designs. Subclass it, name it, `register` it.

    Attributes:
        name: as in configurations, plans and on the command line.
        kind: of the sites it is for.
        needs_original: whether `forward` reads `QKV.original`.
        built_for: the facts, without the path, and the options that the compiler made an instance for.
    """

    name: ClassVar[str]
    kind: ClassVar[SiteKind] = "attention"
    needs_original: bool = False
    built_for: tuple[Site, Any] | None = None

    class Options(Frozen):
        """The design's own options; none unless the subclass has an `Options` of its own."""

    @classmethod
    def companions(cls, options: Any) -> tuple[tuple[type[Design], Any], ...]:
        """List the designs that come with this one for sites of another kind, each with its options. Default: none."""
        return ()

    @classmethod
    @abstractmethod
    def accepts(cls, site: Site, options: Any) -> Verdict:
        """Say whether the design takes a site, and why or why not."""

    def __init__(self, site: Site, options: Any) -> None:
        """Make the module of one site; `taps` and `forward` belong to it."""
        super().__init__()

    def taps(self) -> tuple[Tap, ...]:
        """List the modules to insert into the site's graph, one a place at most."""
        return ()

    def forward(self, x: QKV, tokens: Tokens) -> Tensor:
        """Compute the attention output of all queries, (B, H, L, E). Not called in feed-forward networks.

        Args:
            x: the operands behind the taps.
            tokens: where the image and the other tokens are among the L queries.
        """
        raise NotImplementedError(f"the design {self.name!r} has no forward: {type(self).__name__} works by its taps alone")

    @classmethod
    def parts(cls, site: Site, grid: Sequence[int], others: int, options: Any) -> tuple[Part, ...]:
        """List the products of one sample: of the taps, and of `forward` in the place of softmax attention; nothing pointwise.

        The design's floor is what these take at a machine's best rates. Default: `flops` as one product.

        Args:
            grid: of the image tokens, (h, w) or (t, h, w).
            others: number of tokens that are not image tokens.
        """
        return (Product(math.ceil(cls.flops(site, grid, others, options) / (2 * _SIDE**2)), _SIDE, _SIDE),)

    @classmethod
    def flops(cls, site: Site, grid: Sequence[int], others: int, options: Any) -> int:
        """Count the FLOPs of one sample, in closed form; a multiplication with an addition counts as two. Default: those of `parts`."""
        return total_flops(cls.parts(site, grid, others, options))

    @classmethod
    def allows(cls, rows: int, columns: int, grid: Sequence[int], options: Any) -> bool:
        """Say whether one matrix product may pair `rows` image tokens with `columns`: the audit asks. Default: never quadratic."""
        return min(rows, columns) <= 1


def thinned_grid(grid: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Return the grid behind a tap of that stride, n to ceil(n / stride); () for none."""
    return tuple((n + s - 1) // s for n, s in zip(grid, aligned(stride, len(grid)), strict=True))


def _one_or_several(grids: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    return (grids[0], ()) if len(grids) == 1 else ((), grids)


def tokens_of(x: Tensor, dim: int, grid: Grids, kinds: Sequence[str], lengths: Sequence[int | None], keys: Tokens | None = None) -> Tokens:
    """Make the layout of a token axis, as a rewritten site's graph does in every call.

    Args:
        x: a tensor with the token axis at `dim`.
        grid: its shape is the image tokens' grid; of several images, a tuple.
        kinds: of the segments.
        lengths: of the segments; None for the image, and for one other segment at most, which has what remains.
        keys: the layout of the keys, if `x` are queries and the keys have another one.

    Raises:
        GridError: the grid has not as many positions as there are image tokens.
    """
    image = image_tokens(grid)
    rest = x.shape[dim] - image - sum(n for n in lengths if n is not None)
    if (rest != 0 and len(kinds) == 1) or (not torch.compiler.is_compiling() and rest < 0):
        raise GridError(f"{x.shape[dim]} image tokens do not fill a grid of {in_words(grids_of(grid))} = {image}")
    found = tuple(image if kind == IMAGE else rest if n is None else n for kind, n in zip(kinds, lengths, strict=True))
    return Tokens(tuple(kinds), found, *_one_or_several(grids_of(grid)), keys)
