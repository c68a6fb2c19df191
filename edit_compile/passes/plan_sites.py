"""Decide, site by site: rewritten with which design, or kept for which reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from math import prod

from torch import fx

from edit_compile.config import LinearizeConfig
from edit_compile.designs import find_design
from edit_compile.errors import PlanError
from edit_compile.ir.plan import SitePlan
from edit_compile.ir.tokens import TokenKind, TokenLayout
from edit_compile.passes.axes.algebra import Axes, Axis, Piece, axis_size, shape_of
from edit_compile.passes.canonicalize import SOFTMAXES
from edit_compile.passes.classify_tokens import Tokens
from edit_compile.passes.find_attention import Attention, contractions, module_path, projections
from edit_compile.passes.masks import same_for_all_queries


def plan_sites(graph: fx.Graph, attentions: list[Attention], tokens: Tokens, config: LinearizeConfig) -> list[SitePlan]:
    """One SitePlan for every attention of the graph, linear ones included.

    Raises:
        PlanError: a glob matches no site.
    """
    repeated = {a.path for a in attentions if a.index or any(b.path.startswith(f"{a.path}.") for b in attentions)}
    sites = [_planned(a, tokens, config, a.path in repeated) for a in attentions]
    sites = _of_one_grid(sites, [tokens.grid_sizes(tokens.axes[a.query][-2]) for a in attentions])
    sites += _unread_sites(graph, tokens)
    sites += _linear_sites(graph, tokens, {site.path for site in sites})
    for glob in (*config.include, *config.exclude):
        if sites and not any(fnmatchcase(site.path, glob) for site in sites):
            raise PlanError(f"{glob!r} matches no attention; there are: {', '.join(dict.fromkeys(s.path for s in sites))}")
    return sites


def _planned(attention: Attention, tokens: Tokens, config: LinearizeConfig, repeated: bool) -> SitePlan:
    query_axis, key_axis = tokens.axes[attention.query][-2], tokens.axes[attention.key][-2]
    (query, query_sizes), (key, key_sizes) = tokens.layout(query_axis), tokens.layout(key_axis)
    grid = tokens.grid(query_axis)
    action, reason = _decision(attention, tokens, config, query, key, query_axis, repeated)
    return SitePlan(
        path=attention.path,
        index=attention.index,
        action=action,
        reason=reason,
        query_layout=query,
        key_layout=key,
        grid=grid,
        query_sizes=query_sizes,
        key_sizes=key_sizes,
    )


def _decision(
    attention: Attention,
    tokens: Tokens,
    config: LinearizeConfig,
    query: TokenLayout,
    key: TokenLayout,
    query_axis: Axis,
    repeated: bool,
) -> tuple[str, str]:
    obstacle = _obstacle(attention, tokens, query, key, query_axis, repeated)
    if obstacle:
        return "keep", obstacle
    if not _selected(attention.path, config):
        return "keep", "left out by include and exclude"
    joint = not key.only(TokenKind.IMAGE)
    design = find_design(_AUTOMATIC[joint] if config.design == "auto" else config.design)
    if design.joint != joint:
        return "keep", f"design={design.name!r} is for {_FITS[design.joint]}"
    return design.name, "image tokens and others attend jointly" if joint else "attention between image tokens"


_AUTOMATIC = {False: "edit", True: "mm-edit"}
_FITS = {False: "attention between image tokens alone", True: "joint attention of image tokens and others"}


def _selected(path: str, config: LinearizeConfig) -> bool:
    return any(fnmatchcase(path, glob) for glob in config.include) and not any(fnmatchcase(path, glob) for glob in config.exclude)


def _obstacle(attention: Attention, tokens: Tokens, query: TokenLayout, key: TokenLayout, query_axis: Axis, repeated: bool) -> str | None:
    """Why this attention cannot or need not be rewritten."""
    image_queries, image_keys = query.has(TokenKind.IMAGE), key.has(TokenKind.IMAGE)
    if not image_queries and not image_keys:
        return "no image tokens take part"
    if not image_keys:
        return "cross-attention: linear in image tokens already"
    if not image_queries:
        return "only text queries image: linear in image tokens already"
    if query != key:
        return f"queries {query} and keys {key} differ: not self-attention"
    if sum(s.kind is TokenKind.IMAGE for s in query.segments) != 1:
        return "the image tokens are in several runs"
    if not attention.path:
        return "the attention is in the model's own forward, outside any submodule"
    if repeated:
        return "one module runs several attentions"
    rank = len(shape_of(attention.query) or ())
    if rank != 4:
        return f"its queries have {rank} dimensions, not (batch, heads, tokens, channels)"
    if attention.causal:
        return "causal attention"
    if attention.symbolic_scale:
        return "the softmax scale depends on the sizes of the inputs"
    if attention.mask is not None and not same_for_all_queries(attention.mask):
        return "the mask differs from query to query"
    if not all(any(projections(operand)) for operand in (attention.query, attention.key, attention.value)):
        return "query, key or value does not come from a Linear"
    if _unknown_split(query):
        return f"where the image tokens begin in {query} does not follow from the grid"
    return _grid_obstacle(tokens.axes[attention.query], tokens)


def _grid_obstacle(query: Axes, tokens: Tokens) -> str | None:
    grid = tokens.grid(query[-2])
    if grid is not None and len(grid.sizes) == 3:
        return f"video: the grid {grid} has time, and no design compresses time yet"
    if grid is not None and len(grid.sizes) > 3:
        return f"the image tokens are in blocks, not row by row: {grid}"
    batched = sum(tokens.kind(piece) is TokenKind.IMAGE for axis in query[:-2] for piece in _whole_dimensions(axis))
    if batched > 1 and (grid is None or all(size.isdigit() for size in grid.sizes)):
        return "attention within rows, columns or windows: part of the image's dimensions are in the batch"
    return None


def _whole_dimensions(axis: Axis) -> Iterator[Piece]:
    """The pieces that an axis multiplies, down to those that were not merged from others."""
    for piece in axis:
        if piece.factors:
            yield from (inner for factor in piece.factors for inner in _whole_dimensions(factor))
        else:
            yield piece


def _of_one_grid(sites: list[SitePlan], grids: list[tuple[int, ...]]) -> list[SitePlan]:
    """A model's forward publishes one grid: that of most of its sites. The others are kept."""
    wanted = Counter(grid for site, grid in zip(sites, grids, strict=True) if site.rewritten)
    if len(wanted) < 2:
        return sites
    (most, _), *_ = sorted(wanted.items(), key=lambda item: (-item[1], -len(item[0])))
    reason = "its image tokens are on another grid than those of most sites, and a model's forward publishes one"
    return [
        site if not site.rewritten or _fits(grid, most) else site.model_copy(update={"action": "keep", "reason": reason})
        for site, grid in zip(sites, grids, strict=True)
    ]


def _fits(grid: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Equal, or where only the number of tokens is known, of equal number."""
    return grid == other or (1 in (len(grid), len(other)) and prod(grid) == prod(other))


def _unknown_split(layout: TokenLayout) -> bool:
    """Whether neither the tokens before the image nor those after it have a known number."""
    at = next(i for i, s in enumerate(layout.segments) if s.kind is TokenKind.IMAGE)
    before, after = layout.segments[:at], layout.segments[at + 1 :]
    return not all(s.length.isdigit() for s in before) and not all(s.length.isdigit() for s in after)


def _unread_sites(graph: fx.Graph, tokens: Tokens) -> Iterator[SitePlan]:
    """Softmax between image tokens that canonicalize could not read as attention."""
    reason = "softmax attention in a form that is not recognised; F.scaled_dot_product_attention(q, k, v) and softmax(q @ k.mT * s) @ v are"
    seen: set[str] = set()
    for node in graph.nodes:
        axes, path = tokens.axes.get(node), module_path(node)
        if node.target not in SOFTMAXES or not isinstance(axes, tuple) or len(axes) < 2 or path in seen:
            continue
        dim = node.args[1] % len(axes)
        rows, columns = axes[dim - 1 if dim == len(axes) - 1 else dim + 1], axes[dim]
        if all(tokens.layout(axis)[0].has(TokenKind.IMAGE) and axis_size(axis) > 1 for axis in (rows, columns)):
            seen.add(path)
            yield _kept(path, reason, rows, columns, tokens)


def _linear_sites(graph: fx.Graph, tokens: Tokens, others: set[str]) -> Iterator[SitePlan]:
    """Attention that sums keys and values over the image tokens in a matrix product, with no softmax between."""
    seen = set(others)
    for node, right in contractions(graph):
        axes, path = tokens.axes.get(right), module_path(node)
        if not isinstance(axes, tuple) or len(axes) < 2 or path in seen:
            continue
        if tokens.layout(axes[-2])[0].has(TokenKind.IMAGE) and axis_size(axes[-2]) > 1:
            seen.add(path)
            reason = "already linear attention: keys and values are summed over the image tokens"
            yield _kept(path, reason, axes[-2], axes[-2], tokens)


def _kept(path: str, reason: str, query: Axis, key: Axis, tokens: Tokens) -> SitePlan:
    (query_layout, query_sizes), (key_layout, key_sizes) = tokens.layout(query), tokens.layout(key)
    return SitePlan(
        path=path,
        action="keep",
        reason=reason,
        query_layout=query_layout,
        key_layout=key_layout,
        grid=tokens.grid(query),
        query_sizes=query_sizes,
        key_sizes=key_sizes,
    )
