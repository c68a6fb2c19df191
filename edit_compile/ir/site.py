"""Sites: what the compiler has established about one place in a model, for designs to judge. Facts, no opinions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from edit_compile.ir.plan import MaskKind, SiteKind
from edit_compile.ir.tokens import TokenLayout

Place = Literal[
    "before_query",
    "after_query",
    "before_key",
    "after_key",
    "before_value",
    "after_value",
    "before_hidden",
    "after_hidden",
    "before_output",
]


@dataclass(frozen=True)
class Site:
    """One attention computation or feed-forward network.

    Attributes:
        kind: "attention" or "feed_forward".
        path: the module that holds it and its projections.
        queries, keys: the segments along the token axis of the queries and of the keys; the same for a feed-forward network.
        grid_dims: 2 if the image tokens' grid is (h, w), 3 if it is (t, h, w), None if the graph does not tell.
        channels: at each place where a tap can be inserted. "before" a projection and "after" it; of a feed-forward network,
            `hidden` is its first projection and `output` its last.
        missing: the other places, with the reason why no tap can be inserted there.
        heads: of the queries; `key_heads` of keys and values, fewer in grouped-query attention.
        head_dim: channels of a query's or key's head; `value_dim` of a value's.
        scale: of the softmax; None for the inverse root of `head_dim`.
        mask: none, the same for all queries, or different from query to query.
        causal: whether a query sees the keys up to its own position only.
    """

    kind: SiteKind
    path: str
    queries: TokenLayout
    keys: TokenLayout
    grid_dims: int | None
    channels: Mapping[str, int] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    heads: int = 1
    key_heads: int = 1
    head_dim: int = 1
    value_dim: int = 1
    scale: float | None = None
    mask: MaskKind = "none"
    causal: bool = False

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale
