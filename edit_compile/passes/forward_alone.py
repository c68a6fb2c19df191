"""Capture a design's forward by itself, on operands for an image of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx

from edit_compile.designs.base import QKV, Design, Tokens
from edit_compile.designs.ops.token_spans import in_words
from edit_compile.errors import CaptureError
from edit_compile.ir.tokens import TokenKind, TokenLayout
from edit_compile.passes.axes.algebra import Axes, Axis, new_axis
from edit_compile.passes.axes.propagate import flow_axes
from edit_compile.passes.canonicalize import canonicalize
from edit_compile.passes.capture import capture, what_failed
from edit_compile.passes.classify_tokens import TokenMap
from edit_compile.passes.graph_walk import shape_of
from edit_compile.passes.site_graph import IMAGE_SOURCE, Refused, SiteGraph

_BATCH = 2


class _Operand(NamedTuple):
    """A tensor (batch, `heads`, tokens, `channels`) of tokens in a layout; a mask has the last two the other way round."""

    heads: int
    tokens: Tokens
    channels: int
    is_mask: bool = False

    def example(self, dtype: torch.dtype) -> Tensor:
        sizes = (sum(self.tokens.lengths), self.channels)
        shape = (_BATCH, self.heads, *(sizes[::-1] if self.is_mask else sizes))
        return torch.empty(shape, dtype=torch.bool if self.is_mask else dtype, device="meta")

    def axes(self) -> Axes:
        spans = self.tokens.spans()
        tokens: Axis = sum((new_axis(n, IMAGE_SOURCE if kind == TokenKind.IMAGE else "others") for kind, _, n in spans), ())
        last = (tokens, new_axis(self.channels))
        return new_axis(_BATCH), new_axis(self.heads), *(last[::-1] if self.is_mask else last)


def forward_alone(site: SiteGraph, grid: tuple[int, ...]) -> tuple[fx.Graph, TokenMap]:
    """Capture the forward of a site's design, and follow the image tokens of a grid in it.

    Raises:
        Refused: it fails.
    """
    queries, keys = _on_grid(grid, site.plan.query_layout, site.plan.query_sizes), _on_grid(grid, site.plan.key_layout, site.plan.key_sizes)
    operands = _operands(site, queries, keys)
    module = _Forward(site.chosen, queries if keys == queries else queries._replace(keys=keys))
    given = {name: operand.example(site.captured.dtype) for name, operand in operands.items()}
    try:
        alone = capture(module, given, cast=False, symbolic=False, probes=(site.captured.probe,))
    except CaptureError as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise Refused(
            f"on a grid of {in_words([grid])} `forward` of the design {site.chosen.name!r} fails: {what_failed(cause)}"
        ) from error
    canonicalize(alone.graph)

    def seed(node: fx.Node) -> Axes | None:
        operand = operands.get(str(node.target))
        return operand.axes() if operand is not None and shape_of(node) is not None else None

    return alone.graph, TokenMap(flow_axes(alone.graph, seed), frozenset({IMAGE_SOURCE}))


def _operands(site: SiteGraph, queries: Tokens, keys: Tokens) -> dict[str, _Operand]:
    """Describe the design's operands behind its taps, and its own if it needs them."""
    facts, short = site.facts, keys.thinned(next((tap.stride for tap in site.taps if tap.stride), ()))
    found = {"query": _Operand(facts.heads, queries, facts.head_dim)}
    for prefix, layout in (("", short), *((("own_", keys),) if site.chosen.needs_original else ())):
        found[f"{prefix}key"] = _Operand(facts.key_heads, layout, facts.head_dim)
        found[f"{prefix}value"] = _Operand(facts.key_heads, layout, facts.value_dim)
        if site.plan.mask == "by_key":
            found[f"{prefix}mask"] = _Operand(1, layout, 1, is_mask=True)
    return found


def _on_grid(grid: tuple[int, ...], layout: TokenLayout, sizes: Sequence[int]) -> Tokens:
    """Return a layout with its segments' lengths in the example, but for the image, which is on that grid."""
    kinds = [segment.kind for segment in layout.segments]
    lengths = (math.prod(grid) if kind is TokenKind.IMAGE else size for kind, size in zip(kinds, sizes, strict=True))
    return Tokens(tuple(map(str, kinds)), tuple(lengths), grid)


class _Forward(torch.nn.Module):
    """Calls a design with a fixed layout."""

    def __init__(self, design: Design, tokens: Tokens) -> None:
        super().__init__()
        self.design, self.tokens = design, tokens

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        own_key: Tensor | None = None,
        own_value: Tensor | None = None,
        own_mask: Tensor | None = None,
    ) -> Tensor:
        original = QKV(query, own_key, own_value, own_mask) if own_key is not None and own_value is not None else None
        found: Tensor = self.design(QKV(query, key, value, mask, original), self.tokens)
        return found
