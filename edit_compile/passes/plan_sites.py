"""Decide, site by site: rewritten with which design, or kept for which reason."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from torch import fx

from edit_compile.config import LinearizeConfig
from edit_compile.designs import find_design
from edit_compile.errors import PlanError
from edit_compile.passes.axes import Axis, axis_size, hint, shape_of
from edit_compile.passes.classify_tokens import Tokens
from edit_compile.passes.find_attention import Attention, contractions, module_path, projections
from edit_compile.plans import SitePlan
from edit_compile.tokens import TokenKind, TokenLayout


def plan_sites(graph: fx.Graph, attentions: list[Attention], tokens: Tokens, config: LinearizeConfig) -> list[SitePlan]:
    """One SitePlan for every attention of the graph, linear ones included.

    Raises:
        PlanError: a glob matches no site.
    """
    repeated = {a.path for a in attentions if a.index}
    sites = [_planned(a, tokens, config, a.path in repeated) for a in attentions]
    sites += _linear_sites(graph, tokens)
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
    if attention.causal:
        return "causal attention"
    if _varies_by_query(attention, query_axis):
        return "the mask differs from query to query"
    if not all(any(projections(operand)) for operand in (attention.query, attention.key, attention.value)):
        return "query, key or value does not come from a Linear"
    if _unknown_split(query):
        return f"where the image tokens begin in {query} does not follow from the grid"
    grid = tokens.grid(query_axis)
    if grid is not None and len(grid.sizes) == 3:
        return f"video: the grid {grid} has time, and no design compresses time yet"
    return None


def _varies_by_query(attention: Attention, query_axis: Axis) -> bool:
    shape = shape_of(attention.mask) if attention.mask is not None else None
    return bool(shape and len(shape) > 1 and hint(shape[-2]) == axis_size(query_axis) and _is_not_expanded(attention.mask))


def _is_not_expanded(mask: fx.Node | None) -> bool:
    """Whether a mask with a row per query was computed so, not expanded from one row."""
    while mask is not None and mask.all_input_nodes:
        shape = shape_of(mask)
        if shape is not None and (len(shape) < 2 or hint(shape[-2]) == 1):
            return False
        mask = mask.all_input_nodes[0]
    return True


def _unknown_split(layout: TokenLayout) -> bool:
    """Whether neither the tokens before the image nor those after it have a known number."""
    at = next(i for i, s in enumerate(layout.segments) if s.kind is TokenKind.IMAGE)
    before, after = layout.segments[:at], layout.segments[at + 1 :]
    return not all(s.length.isdigit() for s in before) and not all(s.length.isdigit() for s in after)


def _linear_sites(graph: fx.Graph, tokens: Tokens) -> Iterator[SitePlan]:
    """Attention that sums keys and values over the image tokens in a matrix product, with no softmax between."""
    seen: set[str] = set()
    for node, right in contractions(graph):
        axes, path = tokens.axes.get(right), module_path(node)
        if not isinstance(axes, tuple) or len(axes) < 2 or path in seen:
            continue
        layout, sizes = tokens.layout(axes[-2])
        if layout.has(TokenKind.IMAGE) and axis_size(axes[-2]) > 1:
            seen.add(path)
            yield SitePlan(
                path=path,
                action="keep",
                reason="already linear attention: keys and values are summed over the image tokens",
                query_layout=layout,
                key_layout=layout,
                grid=tokens.grid(axes[-2]),
                query_sizes=sizes,
                key_sizes=sizes,
            )
