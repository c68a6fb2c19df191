"""Rewrite one site's graph: ConvFusion before the query's Linear, the compressor after the key's and value's, and the
design's attention in the place of softmax attention. The rest of the site's graph stays.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx, nn

from edit_compile.config import LinearizeConfig
from edit_compile.designs import Additions, find_design
from edit_compile.designs.ops.token_spans import cut_image, sample_axis
from edit_compile.errors import RewriteError
from edit_compile.ir.plan import SitePlan
from edit_compile.ir.tokens import TokenKind
from edit_compile.passes.axes.algebra import Axis, Piece, Value, axis_size, hint, shape_of
from edit_compile.passes.axes.propagate import flow_axes
from edit_compile.passes.canonicalize import canonicalize
from edit_compile.passes.capture import Capture
from edit_compile.passes.clone_branch import IMAGE, Lane, is_image, place
from edit_compile.passes.find_attention import LINEARS, Attention, find_attention
from edit_compile.passes.normalize import clean, remove_dead
from edit_compile.passes.op_traits import MOVES, mixing_node, name_of

ADDED = "edit"
aten = torch.ops.aten


@dataclass(frozen=True)
class RewrittenGraph:
    """A site's new graph; its last placeholder is the grid."""

    graph: fx.Graph
    additions: Additions


def rewrite_site(captured: Capture, module: nn.Module, site: SitePlan, config: LinearizeConfig) -> RewrittenGraph:
    """Rewrite a copy of a site's captured graph.

    Raises:
        RewriteError: an operation stands in the way; says which.
    """
    if hasattr(module, ADDED):
        raise RewriteError(f"{site.path} has an attribute {ADDED!r} of its own, the name that added modules get")
    canonicalize(captured.graph)
    axes = flow_axes(captured.graph, lambda node: _seed(node, captured, site))
    attention = _only_attention(captured.graph, site)
    _check_layout(axes, attention, site)
    _check_token_wise(attention, axes, site)
    graph = clean(captured, module)
    axes = flow_axes(graph, lambda node: _seed(node, captured, site) if node.op == "placeholder" else None)
    attention = _only_attention(graph, site)
    return _Rewriter(graph, axes, attention, site, config).run()


def _only_attention(graph: fx.Graph, site: SitePlan) -> Attention:
    found = find_attention(graph)
    if len(found) != 1:
        why = "; does it return its attention's weights?" if not found else ""
        raise RewriteError(f"{site.path}: captured on its own, the module runs {len(found)} attentions that can be read, not one{why}")
    return found[0]


def _seed(node: fx.Node, captured: Capture, site: SitePlan) -> Value:
    """A site's inputs know their tokens by number: the whole model's graph has told which numbers there are."""
    shape = shape_of(node)
    if shape is None or captured.sources.get(node.name) is None or captured.source(node).kind != "input":
        return None
    pieces = tuple(
        Piece(size, segment.length, frozenset({IMAGE if segment.kind is TokenKind.IMAGE else "others"}))
        for size, segment in zip(site.query_sizes, site.query_layout.segments, strict=True)
    )
    known = {axis_size(pieces): pieces} | {piece.size: (piece,) for piece in pieces if piece.size > 1}
    at = next(i for i, p in enumerate(pieces) if IMAGE in p.all_sources)
    for low in range(at + 1):
        for high in range(at + 1, len(pieces) + 1):
            known.setdefault(axis_size(pieces[low:high]), pieces[low:high])
    return tuple(
        known.get(hint(s)) or (Piece(hint(s), "1" if hint(s) == 1 else str(s)),) if d or len(shape) < 3 else (Piece(hint(s), str(s)),)
        for d, s in enumerate(shape)
    )


def _check_layout(axes: dict[fx.Node, Value], attention: Attention, site: SitePlan) -> None:
    for operand in (attention.query, attention.key, attention.value):
        found = [is_image((piece,)) for piece in axes[operand][-2]]
        expected = [s.kind is TokenKind.IMAGE for s in site.query_layout.segments]
        if _runs(found) != _runs(expected):
            raise RewriteError(
                f"{site.path}: {operand.name} has its tokens in another order than the whole model's graph; "
                "give example inputs in which all sizes differ"
            )


def _runs(flags: list[bool]) -> list[bool]:
    return [flag for i, flag in enumerate(flags) if i == 0 or flag != flags[i - 1]]


def _check_token_wise(attention: Attention, axes: dict[fx.Node, Value], site: SitePlan) -> None:
    """Between its Linear and the attention, nothing may mix tokens: that part runs on fewer of them."""
    for operand in (attention.key, attention.value):
        linear = image_linear(operand, axes, site)
        between = list(_between(linear, operand))
        mixing = mixing_node(between, axes, is_image)
        if mixing is not None:
            raise RewriteError(f"{site.path}: {mixing.target} ({mixing.name}) mixes image tokens between projection and attention")


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The nodes on every way from `first` to `last`, both included, in order."""
    down = {first}
    for node in first.graph.nodes:
        if down.intersection(node.all_input_nodes):
            down.add(node)
    up, pending = {last}, [last]
    while pending:
        for operand in pending.pop().all_input_nodes:
            if operand not in up:
                up.add(operand)
                pending.append(operand)
    return [n for n in first.graph.nodes if n in down and n in up]


def is_linear(node: fx.Node) -> bool:
    return node.target in LINEARS or bool(node.op == "call_module" and node.meta.get("linear"))


def image_linear(node: fx.Node, axes: dict[fx.Node, Value], site: SitePlan) -> fx.Node:
    """The Linear that the image tokens of a query, key or value come from."""
    found, pending, seen = [], [node], {node}
    while pending:
        at = pending.pop()
        if is_linear(at):
            found.append(at)
            continue
        for operand in at.all_input_nodes:
            value = axes.get(operand)
            if operand not in seen and (isinstance(value, list) or (isinstance(value, tuple) and any(map(is_image, value)))):
                seen.add(operand)
                pending.append(operand)
    if len(found) != 1:
        raise RewriteError(f"{site.path}: {node.name} comes from {len(found)} Linears of image tokens, not one")
    tokens = axes[found[0].args[0]]
    if len(tokens) != 3 or not is_image(tokens[1]):
        raise RewriteError(f"{site.path}: {found[0].name} is not a Linear over (batch, tokens, channels)")
    return found[0]


class _Rewriter:
    def __init__(self, graph: fx.Graph, axes: dict[fx.Node, Value], attention: Attention, site: SitePlan, config: LinearizeConfig):
        self.graph, self.axes, self.attention, self.site, self.config = graph, axes, attention, site, config
        self.channels: dict[str, int] = {}
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        with graph.inserting_after(last):
            self.grid = graph.placeholder("edit_grid")

    def run(self) -> RewrittenGraph:
        attention = self.attention
        before, after = place(self.axes[attention.query][-2])
        scale, shape = attention.scale, shape_of(attention.query) or ()
        joint = find_design(self.site.action).joint
        with self.graph.inserting_before(attention.node):
            query = self._query_lane()
            key = self._key_lane("key", attention.key)
            value = self._key_lane("value", attention.value)
            compressed = self.config.key == "compressor"
            mask = self._row(attention.mask)
            short = self._sampled(mask) if compressed else mask
            if joint:
                full = (attention.key, attention.value, mask) if compressed and self.config.text_keys == "full" else None
                new = self.graph.call_module(ADDED, (query, key, value, self.grid, short, full))
            else:
                new = self.graph.call_module(ADDED, (query, key, value, short))
        new.meta = dict(attention.node.meta)
        attention.node.replace_all_uses_with(new)
        self.graph.erase_node(attention.node)
        remove_dead(self.graph)
        self.graph.lint()
        heads, head_channels = int(shape[1]), int(shape[-1])
        additions = Additions(self.site.action, self.channels, heads, head_channels, scale, before, after)
        return RewrittenGraph(self.graph, additions)

    def _query_lane(self) -> fx.Node:
        return self._fused_lane("query", self.attention.query, compressed=False)

    def _key_lane(self, name: str, operand: fx.Node) -> fx.Node:
        kind = getattr(self.config, name)
        if kind == "compressor":
            return self._compressed_lane(name, operand)
        return self._fused_lane(name, operand, compressed=False)

    def _fused_lane(self, name: str, operand: fx.Node, *, compressed: bool) -> fx.Node:
        """ConvFusion on the image tokens that enter the Linear."""
        linear = image_linear(operand, self.axes, self.site)
        source = linear.args[0]
        self.channels[name] = int((shape_of(source) or ())[-1])
        if getattr(self.config, name) == "plain":
            return operand
        fused = self._on_image(name, source)
        projected = self.graph.node_copy(linear, lambda n: fused if n is source else n)
        projected.meta = dict(linear.meta)
        return Lane(self.graph, self.axes, self.grid, {linear: projected}, compressed=compressed).emit(operand)

    def _compressed_lane(self, name: str, operand: fx.Node) -> fx.Node:
        """The compressor on the image tokens that leave the Linear, cut to this operand's part if it is fused."""
        anchor = self._anchor(image_linear(operand, self.axes, self.site), operand)
        shape = shape_of(anchor) or ()
        dim = _token_dim(self.axes[anchor])
        others = [hint(s) for d, s in enumerate(shape) if d not in (0, dim)]
        self.channels[name] = int(torch.tensor(others).prod())
        tokens = anchor
        if len(shape) != 3 or dim != 1:
            moved = self.graph.call_function(torch.movedim, (anchor, dim, 1))
            tokens = self.graph.call_function(torch.flatten, (moved, 2))
        short = self._on_image(name, tokens, place(self.axes[anchor][dim]))
        if tokens is not anchor:
            split = self.graph.call_function(torch.unflatten, (short, 2, others))
            short = self.graph.call_function(torch.movedim, (split, 1, dim))
        short.meta = dict(anchor.meta)
        return Lane(self.graph, self.axes, self.grid, {anchor: short}, compressed=True).emit(operand)

    def _on_image(self, name: str, tokens: fx.Node, where: tuple[int | None, int | None] | None = None) -> fx.Node:
        """Call an added module on the image part of (B, tokens, channels)."""
        before, after = where or place(self.axes[tokens][1])
        target = f"{ADDED}.{name}"
        if (before, after) == (0, 0):
            return self.graph.call_module(target, (tokens, self.grid))
        parts = self.graph.call_function(cut_image, (tokens, 1, self.grid, before, after))
        front, image, back = (self.graph.call_function(operator.getitem, (parts, i)) for i in range(3))
        return self.graph.call_function(torch.cat, ([front, self.graph.call_module(target, (image, self.grid)), back], 1))

    def _anchor(self, linear: fx.Node, operand: fx.Node) -> fx.Node:
        """The first node after the Linear, through moves alone, that holds fewest numbers per token: this operand's part."""
        way = set(_between(linear, operand))
        best, node = linear, linear
        while True:
            users = [u for u in node.users if u in way]
            if len(users) != 1 or name_of(users[0]) not in MOVES:
                return best
            node = users[0]
            if isinstance(self.axes.get(node), tuple) and _numbers(node) < _numbers(best) and _batch_first(self.axes[node]):
                best = node

    def _row(self, mask: fx.Node | None) -> fx.Node | None:
        """A mask with one row for all queries."""
        if mask is None or hint((shape_of(mask) or (1, 1))[-2]) == 1:
            return mask
        row = self.graph.call_function(aten.slice.Tensor, (mask, -2, 0, 1))
        row.meta = {**mask.meta, "row_of": mask}
        return row

    def _sampled(self, mask: fx.Node | None) -> fx.Node | None:
        if mask is None:
            return None
        axes = self.axes[mask.meta.get("row_of", mask)]
        if axis_size(axes[-1]) == 1:
            return mask
        if not is_image(axes[-1]):
            raise RewriteError(f"{self.site.path}: the mask {mask.name} is not by token")
        return self.graph.call_function(sample_axis, (mask, len(axes) - 1, self.grid, *place(axes[-1])))


def _numbers(node: fx.Node) -> int:
    return int(torch.tensor([hint(s) for s in shape_of(node) or ()]).prod())


def _token_dim(axes: tuple[Axis, ...]) -> int:
    return next(d for d, axis in enumerate(axes) if is_image(axis) and axis_size(axis) > 1)


def _batch_first(axes: tuple[Axis, ...]) -> bool:
    return len(axes) >= 3 and not is_image(axes[0]) and any(is_image(axis) for axis in axes)
