"""Decide, site by site, from the whole model's graph: which designs may be tried, or why the site is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import fx

from edit_compile.config import Choice, LinearizeConfig
from edit_compile.errors import PlanError
from edit_compile.ir.plan import KEEP, Refusal, SiteKind, SitePlan
from edit_compile.ir.tokens import Segment, TokenKind, TokenLayout
from edit_compile.passes.axes.algebra import Axes, Axis, AxisSegment, axes_of
from edit_compile.passes.classify_tokens import TokenMap
from edit_compile.passes.find_attention import Attention
from edit_compile.passes.find_feed_forward import FeedForward
from edit_compile.passes.graph_walk import op_name, operand, shape_of
from edit_compile.passes.masks import mask_facts
from edit_compile.passes.other_attention import CHANNELS, other_attention
from edit_compile.passes.site_graph import refusal

MAX_GRID_DIMS = 3


@dataclass(frozen=True)
class Candidate:
    """A site and the designs to try at it, in order; none for a site that is kept, whose plan says why.

    Attributes:
        beside: the paths of the attention beside a feed-forward network: what their designs bring is tried only with these designs.
    """

    plan: SitePlan
    choices: tuple[Choice, ...] = ()
    beside: tuple[str, ...] = ()


def plan_sites(
    graph: fx.Graph,
    attentions: Sequence[Attention],
    networks: Sequence[FeedForward],
    tokens: TokenMap,
    config: LinearizeConfig,
    weights: Set[fx.Node] = frozenset(),
) -> list[Candidate]:
    """List one candidate for every attention of the graph, linear ones included, and for the feed-forward networks that rules name.

    Args:
        weights: the graph's inputs that are parameters of the model.

    Raises:
        PlanError: a glob matches no site.
    """
    choices = config.choices()
    filtered = _filtered_along(graph, tokens)
    found = [_of_attention(facts, config, choices, weights) for facts in _attention_facts(attentions, tokens, filtered)]
    others: list[str] = []  # the paths of networks that no rule converts
    if any(choice.design is not None and choice.design.kind == "feed_forward" for choice in choices):
        others = [network.path for network in networks if network.path]
        of_networks = (_of_network(network, tokens, config, choices, found) for network in networks)
        found += [candidate for candidate in list(of_networks) if candidate is not None]
    found += [Candidate(plan) for plan in _other_sites(graph, tokens, {candidate.plan.path for candidate in found})]
    _check_globs([*(candidate.plan.path for candidate in found), *others], config)
    return found


def _check_globs(paths: Sequence[str], config: LinearizeConfig) -> None:
    for glob in (*config.include, *config.exclude, *(rule.paths for rule in config.rules)):
        if paths and not any(fnmatchcase(path, glob) for path in paths):
            raise PlanError(f"{glob!r} matches no site; there are: {', '.join(dict.fromkeys(paths))}")


@dataclass(frozen=True)
class _Facts:
    """What the graph tells of one attention."""

    attention: Attention
    tokens: TokenMap
    queries: TokenLayout
    keys: TokenLayout
    shared_module: bool  # with other attention
    filtered: Set[str]  # the numbers of tokens of sequences that a convolution or pooling over one dimension runs along

    @property
    def query_axis(self) -> Axis:
        return axes_of(self.attention.query, self.tokens.axes)[-2]


def _attention_facts(attentions: Sequence[Attention], tokens: TokenMap, filtered: Set[str]) -> Iterator[_Facts]:
    shared = {a.path for a in attentions if a.index or any(b.path.startswith(f"{a.path}.") for b in attentions)}
    for attention in attentions:
        queries, _ = tokens.layout(axes_of(attention.query, tokens.axes)[-2])
        keys, _ = tokens.layout(axes_of(attention.key, tokens.axes)[-2])
        yield _Facts(attention, tokens, queries, keys, attention.path in shared, filtered)


def _of_attention(facts: _Facts, config: LinearizeConfig, choices: Sequence[Choice], weights: Set[fx.Node]) -> Candidate:
    attention, tokens = facts.attention, facts.tokens
    plan = _site_plan(attention.path, facts.query_axis, axes_of(attention.key, tokens.axes)[-2], tokens, index=attention.index)
    mask, causal = mask_facts(attention.mask, attention.node, weights)
    plan = plan.model_copy(update={"mask": mask, "causal": causal or attention.causal})
    if (lost := _lost(facts)) is not None:
        return Candidate(plan.kept(lost, refusal(lost, attention.node)))
    if (nothing_to_do := _takes_no_part(facts)) is not None:
        return Candidate(plan.kept(nothing_to_do))
    reason = next((reason for check in _CHECKS if (reason := check(facts)) is not None), None)
    if reason is not None:
        return Candidate(plan.kept(reason, refusal(reason, attention.node)))
    return _chosen(plan, config, choices)


def _of_network(
    network: FeedForward, tokens: TokenMap, config: LinearizeConfig, choices: Sequence[Choice], attention: Sequence[Candidate]
) -> Candidate | None:
    """Make a candidate for a network over image tokens; None for one over other things, and one that nothing could be for."""
    axes = tokens.axes.get(network.source)
    if not isinstance(axes, tuple) or len(axes) < 2 or not tokens.layout(axes[-2])[0].has(TokenKind.IMAGE):
        return None
    plan = _site_plan(network.path, axes[-2], axes[-2], tokens, index=network.index, kind="feed_forward")
    own = _chosen(plan, config, choices)
    if not own.choices:
        return own if any(choice.brought_by is not None for choice in choices) else None
    runs = sum(s.kind is TokenKind.IMAGE for s in plan.query_layout.segments)
    reason = _outside(network.path) or (f"its input has {len(axes)} dimensions, not (batch, tokens, channels)" if len(axes) != 3 else None)
    reason = reason or ("the image tokens are in several runs" if runs != 1 else _unknown_start(plan.query_layout))
    # A network in a module around attention that is to be rewritten would be rewritten with it as it was.
    attended = [candidate.plan.path for candidate in attention if candidate.choices]
    inside = next((path for path in attended if path == plan.path or path.startswith(f"{plan.path}.")), None)
    if reason is None and inside is not None:
        reason = f"its module holds attention that is to be rewritten, at {inside}"
    if reason is not None:
        return Candidate(plan.kept(reason, refusal(reason, network.output)))
    return replace(own, beside=attention_beside(plan.path, [candidate.plan.path for candidate in attention]))


def attention_beside(path: str, attention: Sequence[str]) -> tuple[str, ...]:
    """Find the attention in the innermost module around a network that holds any; what is in another element of a list is not beside it."""
    around = path
    while around:
        around = around.rpartition(".")[0]
        inside = tuple(other for other in attention if (other.startswith(f"{around}.") if around else "." not in other))
        if inside:
            return inside
        if around.rpartition(".")[2].isdigit():
            return ()
    return ()


def with_companions(candidate: Candidate, planned: Mapping[str, SitePlan]) -> Candidate:
    """Drop the choices that designs bring from a network beside which no attention has got these designs.

    Args:
        planned: the plans of all attention, by path.
    """
    beside = [planned[path] for path in candidate.beside]
    choices = tuple(c for c in candidate.choices if c.brought_by is None or any(_is_of(plan, c.brought_by) for plan in beside))
    if choices or not candidate.choices:
        return replace(candidate, choices=choices)
    first = candidate.choices[0]
    assert first.design is not None
    assert first.brought_by is not None
    assert first.brought_by.design is not None
    bringing = first.brought_by.design.name
    return Candidate(candidate.plan.kept(f"{first.design.name} comes with {bringing}, and no attention beside this network has got that"))


def _is_of(plan: SitePlan, choice: Choice) -> bool:
    assert choice.design is not None
    return plan.action == choice.design.name and plan.options == choice.options.model_dump(mode="json")


def _chosen(plan: SitePlan, config: LinearizeConfig, choices: Sequence[Choice]) -> Candidate:
    if not any(fnmatchcase(plan.path, glob) for glob in config.include) or any(fnmatchcase(plan.path, glob) for glob in config.exclude):
        return Candidate(plan.kept("left out by include and exclude"))
    named = [choice for choice in choices if fnmatchcase(plan.path, choice.paths)]
    own = [choice for choice in named if choice.design is None or choice.design.kind == plan.kind]
    if not own:
        return Candidate(plan.kept(_not_named(plan, [choice for choice in named if choice.brought_by is None])))
    if own[0].design is None:
        return Candidate(plan.kept(own[0].reason or f"kept by the rule for {own[0].paths!r}"))
    return Candidate(plan, tuple(own))


def _not_named(plan: SitePlan, named: Sequence[Choice]) -> str:
    other = next((choice.design for choice in named if choice.design is not None), None)
    if other is None:
        return "no rule names it"
    return f"the design {other.name!r} is for sites of kind {other.kind}, this one is of kind {plan.kind}"


# ------------------------------------------------------------------ what no design can do anything about


def _lost(facts: _Facts) -> str | None:
    """Refuse where image tokens came through an operator of which is not known where it puts them."""
    attention = facts.attention
    operands = (axes_of(node, facts.tokens.axes) for node in (attention.query, attention.key, attention.value))
    name = facts.tokens.operator_without_rule(*(axes[-2] for axes in operands))
    return f"{name} has no rule: where it puts image tokens is unknown" if name is not None else None


_IN_BATCH = "attention within rows, columns or windows: part of the image's dimensions are in the batch"


def _takes_no_part(facts: _Facts) -> str | None:
    image_queries, image_keys = facts.queries.has(TokenKind.IMAGE), facts.keys.has(TokenKind.IMAGE)
    if not image_queries and not image_keys:
        *_, channels_axis = axes = axes_of(facts.attention.query, facts.tokens.axes)
        channels, _ = facts.tokens.layout(channels_axis)
        inside = not facts.queries.has(TokenKind.TEXT) and _image_dims_in_batch(axes, facts.tokens) > 1
        return CHANNELS if channels.has(TokenKind.IMAGE) else _IN_BATCH if inside else "no image tokens take part"
    if not image_keys:
        return "cross-attention: linear in image tokens already"
    return None if image_queries else "the image tokens are keys and values only: linear in image tokens already"


def _not_self_attention(facts: _Facts) -> str | None:
    """Refuse image queries over other image tokens than their own: pooled ones, a window's, those of another picture."""
    queries, keys = (_image_segments(layout) for layout in (facts.queries, facts.keys))
    if queries == keys:
        return None
    return f"the image tokens of the queries {facts.queries} are not those of the keys {facts.keys}: not self-attention"


def _several_runs(facts: _Facts) -> str | None:
    runs = max(len(_image_segments(layout)) for layout in (facts.queries, facts.keys))
    return None if runs == 1 else "the image tokens are in several runs"


def _image_segments(layout: TokenLayout) -> list[Segment]:
    return [segment for segment in layout.segments if segment.kind is TokenKind.IMAGE]


_IN_ONE_DIMENSION = frozenset(
    """conv1d conv_transpose1d avg_pool1d max_pool1d max_pool1d_with_indices adaptive_avg_pool1d adaptive_max_pool1d
    upsample_nearest1d upsample_linear1d""".split()  # noqa: SIM905
)


def _filtered_along(graph: fx.Graph, tokens: TokenMap) -> Set[str]:
    """Find the lengths of sequences that run through a convolution or pooling over one dimension.

    One of one tap does to (batch, channels, tokens) what a Linear does: it tells a sequence only where the input has that form.
    """
    channels_first = tokens.last_sizes(rank=3)
    lengths: set[str] = set()
    for node in graph.nodes:
        if op_name(node) in _IN_ONE_DIMENSION and isinstance(tokens.axes.get(node), tuple):
            weight = shape_of(operand(node, 1)) if "conv" in op_name(node) else None
            before, behind = (axes_of(each, tokens.axes)[-1] for each in (operand(node, 0), node))
            along = {segment.expr for axis in (before, behind) for segment in axis if tokens.kind(segment) is TokenKind.IMAGE}
            lengths |= along if weight is None or weight[-1] != 1 else along & channels_first
    return lengths


def _sequence(facts: _Facts) -> str | None:
    """Refuse sound and other sequences: packed latents of an image are (batch, tokens, channels), and no filter runs along them."""
    image = {segment.length for segment in _image_segments(facts.queries)}
    if facts.tokens.grid(facts.query_axis) is not None or facts.tokens.from_pictures(facts.query_axis) or not image & facts.filtered:
        return None
    return "its tokens run through a one-dimensional convolution or pooling: they are a sequence, not an image"


def _not_in_a_module(facts: _Facts) -> str | None:
    return _outside(facts.attention.path)


def _outside(path: str) -> str | None:
    return None if path else "the attention is in the model's own forward, outside any submodule"


def _shares_its_module(facts: _Facts) -> str | None:
    return "one module runs several attentions" if facts.shared_module else None


def _other_rank(facts: _Facts) -> str | None:
    rank = len(shape_of(facts.attention.query) or ())
    return None if rank == 4 else f"its queries have {rank} dimensions, not (batch, heads, tokens, channels)"


def _scale_by_size(facts: _Facts) -> str | None:
    return "the softmax scale depends on the sizes of the inputs" if facts.attention.symbolic_scale else None


def _start_unknown(facts: _Facts) -> str | None:
    return _unknown_start(facts.queries) or _unknown_start(facts.keys)


def _unknown_start(layout: TokenLayout) -> str | None:
    """Refuse where neither the tokens before the image nor those after it have a known number."""
    at = next(i for i, s in enumerate(layout.segments) if s.kind is TokenKind.IMAGE)
    sides = (layout.segments[:at], layout.segments[at + 1 :])
    if any(all(s.length.isdigit() for s in side) for side in sides):
        return None
    return f"where the image tokens begin in {layout} does not follow from the grid"


def _video_in_unknown_order(facts: _Facts) -> str | None:
    """Refuse a video whose tokens have no known grid: whoever states one must not be asked for that of an image."""
    if facts.tokens.grid(facts.query_axis) is not None or not facts.tokens.from_video(facts.query_axis):
        return None
    return "the image tokens are those of a video, in an order in which its grid of frames, rows and columns is not known"


def _grid_in_blocks(facts: _Facts) -> str | None:
    grid = facts.tokens.grid(facts.query_axis)
    return f"the image tokens are in blocks, not row by row: {grid}" if grid is not None and len(grid.sizes) > MAX_GRID_DIMS else None


def _part_of_the_image(facts: _Facts) -> str | None:
    """Refuse attention whose batch holds some of the image's dimensions and whose tokens are the rest, of constant number."""
    grid, axes = facts.tokens.grid(facts.query_axis), axes_of(facts.attention.query, facts.tokens.axes)
    constant = grid is None or all(size.isdigit() for size in grid.sizes)
    return _IN_BATCH if constant and _image_dims_in_batch(axes, facts.tokens) > 1 else None


def _image_dims_in_batch(axes: Axes, tokens: TokenMap) -> int:
    """Count the dimensions of the image, its own batch among them, that are in the batch of attention.

    Where the number of tokens is open, a constant one by itself is none: it may be the channels of a table for the tokens.
    """
    fixed = all(segment.expr.isdigit() for segment in axes[-2])
    counted = (axis for axis in axes[:-2] if fixed or len(axis) > 1 or axis[0].composed_of or not axis[0].expr.isdigit())
    return sum(tokens.kind(segment) is TokenKind.IMAGE for axis in counted for segment in _uncomposed(axis))


def _uncomposed(axis: Axis) -> Iterator[AxisSegment]:
    """Yield the segments that an axis multiplies, down to those that were not merged from others."""
    for segment in axis:
        if segment.composed_of:
            yield from (inner for factor in segment.composed_of for inner in _uncomposed(factor))
        else:
            yield segment


_CHECKS: tuple[Callable[[_Facts], str | None], ...] = (
    _sequence,
    _not_self_attention,
    _several_runs,
    _not_in_a_module,
    _shares_its_module,
    _part_of_the_image,
    _other_rank,
    _scale_by_size,
    _start_unknown,
    _video_in_unknown_order,
    _grid_in_blocks,
)


# ------------------------------------------------------------------ attention in other forms


def _other_sites(graph: fx.Graph, tokens: TokenMap, others: set[str]) -> Iterator[SitePlan]:
    """Yield attention between image tokens that is not one node of softmax attention, with what it is instead.

    Args:
        others: the paths of sites that are listed already; a sum over tokens there is part of theirs.
    """
    for found in other_attention(graph, tokens):
        if found.is_quadratic or found.path not in others:
            stands_in_the_way = refusal(found.reason, found.node) if found.is_quadratic else None
            yield _site_plan(found.path, found.rows, found.columns, tokens).kept(found.reason, stands_in_the_way)


def _site_plan(path: str, query: Axis, key: Axis, tokens: TokenMap, *, index: int = 0, kind: SiteKind = "attention") -> SitePlan:
    (query_layout, query_sizes), (key_layout, key_sizes) = tokens.layout(query), tokens.layout(key)
    return SitePlan(
        path=path,
        index=index,
        kind=kind,
        action=KEEP,
        reason="",
        query_layout=query_layout,
        key_layout=key_layout,
        grid=tokens.grid(query),
        query_sizes=query_sizes,
        key_sizes=key_sizes,
        grid_sizes=tokens.grid_sizes(query) if tokens.grid(query) is not None else (),
    )


def decided(candidate: Candidate, choice: Choice, reason: str) -> SitePlan:
    """Return the plan of a site that gets a design."""
    assert choice.design is not None
    options = choice.options.model_dump(mode="json")
    reason = "; ".join(part for part in (reason, choice.reason) if part)
    return candidate.plan.model_copy(update={"action": choice.design.name, "options": options, "reason": reason, "refusal": None})


def refused(candidate: Candidate, refusals: Sequence[tuple[str, Refusal]]) -> SitePlan:
    """Return the plan of a site that every design has refused; what they have in common is said once."""
    reasons = list(dict.fromkeys(r.reason for _, r in refusals))
    reason = reasons[0] if len(reasons) == 1 else "; ".join(f"{name}: {r.reason}" for name, r in refusals)
    first = next((r for _, r in refusals if r.node is not None), refusals[0][1])
    return candidate.plan.kept(reason, first.model_copy(update={"reason": reason}))
