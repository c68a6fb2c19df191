"""The passes that rewrite one site's graph: find its core, insert the design's taps, put its attention in place."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from edit_compile.designs.base import QKV, Tap, tokens_of
from edit_compile.designs.ops.key_masks import as_key_mask
from edit_compile.designs.ops.token_spans import cut_image, on_images, sample_axis
from edit_compile.ir.plan import Refusal
from edit_compile.ir.site import Place, Site
from edit_compile.ir.tokens import TokenKind, TokenLayout
from edit_compile.passes.axes.algebra import Axis, axes_of, hint
from edit_compile.passes.axes.propagate import flow_axes
from edit_compile.passes.canonicalize import canonicalize, drop_returned_weights
from edit_compile.passes.clone_branch import BranchCloner, thinned_sizes
from edit_compile.passes.find_attention import Attention, find_attention, is_projection
from edit_compile.passes.find_feed_forward import FeedForward, find_feed_forward
from edit_compile.passes.graph_walk import between, op_name, operand, remove_dead, shape_of, upstream
from edit_compile.passes.masks import same_for_all_queries
from edit_compile.passes.normalize import normalize
from edit_compile.passes.op_traits import VIEW_OPS
from edit_compile.passes.site_axes import TokenDims, counts_tokens, equal_sizes, seed_axes, token_dims
from edit_compile.passes.site_graph import ADDED, Refused, SiteGraph, image_place, is_image, refusal
from edit_compile.passes.token_cuts import canonicalize_cuts

aten = torch.ops.aten
_OPERANDS: dict[str, tuple[Place, Place]] = {  # and the places before and after the Linear that each comes from
    "query": ("before_query", "after_query"),
    "key": ("before_key", "after_key"),
    "value": ("before_value", "after_value"),
}


def canonicalize_site(site: SiteGraph) -> int:
    """Rewrite attention written by hand to one node."""
    if hasattr(site.module, ADDED):
        raise Refused(f"{site.plan.path} has an attribute {ADDED!r} of its own, the name that added modules get")
    if site.plan.kind == "attention":
        drop_returned_weights(site.graph)
    found = canonicalize(site.graph)
    canonicalize_cuts(site.graph, lambda size: counts_tokens(size, site))
    return found


# ------------------------------------------------------------------ facts


def locate_core(site: SiteGraph) -> int:
    """Find the attention or feed-forward network, and where taps can be inserted; counts these places.

    Raises:
        Refused: the module on its own is not what the whole model's graph says of it.
    """
    site.axes = flow_axes(site.graph, lambda node: seed_axes(node, site.captured, site))
    if site.plan.kind == "attention":
        site.core = attention = _only_attention(site)
        _check_layout(site, attention)
        site.places = dict(_attention_places(site, attention))
        site.site = replace(_facts(site), **_head_facts(attention))
    else:
        site.core = network = _only_network(site)
        site.places = dict(_network_places(site, network))
        site.site = _facts(site)
    return len(site.site.channels)


def _facts(site: SiteGraph) -> Site:
    plan = site.plan
    channels: dict[str, int] = {place: _channels(node, site) for place, node in site.places.items() if isinstance(node, fx.Node)}
    return Site(
        kind=plan.kind,
        path=plan.path,
        queries=plan.query_layout,
        keys=plan.key_layout,
        grid_dims=len(plan.grid.sizes) if plan.grid is not None else None,
        channels=channels,
        missing={place: found.reason for place, found in site.places.items() if isinstance(found, Refusal)},
        mask=plan.mask,
        causal=plan.causal,
    )


def _head_facts(attention: Attention) -> dict[str, Any]:
    query, key, value = (shape_of(node) or () for node in (attention.query, attention.key, attention.value))
    heads = {"heads": int(query[1]), "key_heads": int(key[1])}
    return heads | {"head_dim": int(query[-1]), "value_dim": int(value[-1]), "scale": attention.scale}


def _only_attention(site: SiteGraph) -> Attention:
    found = find_attention(site.graph)
    if len(found) != 1:
        why = "; does it return its attention's weights?" if not found else ""
        raise Refused(f"{site.plan.path}: captured on its own, the module runs {len(found)} attentions that can be read, not one{why}")
    return found[0]


def _only_network(site: SiteGraph) -> FeedForward:
    found = [network for network in find_feed_forward(site.graph) if any(map(is_image, axes_of(network.source, site.axes)))]
    if len(found) != 1:
        raise Refused(
            f"{site.plan.path}: captured on its own, the module runs {len(found)} feed-forward networks over image tokens, not one"
        )
    return found[0]


def _check_layout(site: SiteGraph, attention: Attention) -> None:
    layouts = (site.plan.query_layout, site.plan.key_layout, site.plan.key_layout)
    for node, layout in zip((attention.query, attention.key, attention.value), layouts, strict=True):
        found = _runs([is_image((segment,)) for segment in axes_of(node, site.axes)[-2]])
        if found != _runs([segment.kind is TokenKind.IMAGE for segment in layout.segments]):
            raise Refused(f"{site.plan.path}: {_other_order(node, found, site)}", node)


def _other_order(node: fx.Node, found: list[bool], site: SiteGraph) -> str:
    """Say how a site's own graph differs from the whole model's, and what to do if equal sizes are the cause."""
    order = " and ".join("image" if image else "other" for image in found)
    told = f"has {order} tokens, in another order than in the whole model's graph" if any(found) else "has no image tokens"
    return f"captured on its own, its {node.name} {told}, as far as the arguments of its forward tell{_told_of_equal_sizes(site)}"


def _told_of_equal_sizes(site: SiteGraph) -> str:
    equal = equal_sizes(site)
    return f"; {equal}: give example inputs in which all sizes differ" if equal else ""


def _runs(flags: list[bool]) -> list[bool]:
    return [flag for i, flag in enumerate(flags) if i == 0 or flag != flags[i - 1]]


# ------------------------------------------------------------------ places for taps


def _attention_places(site: SiteGraph, attention: Attention) -> Iterator[tuple[Place, fx.Node | Refusal]]:
    """Yield, for the query, key and value, the tensor that enters its Linear and the one that leaves it, or why there is none."""
    for (before, after), node in zip(_OPERANDS.values(), (attention.query, attention.key, attention.value), strict=True):
        try:
            linear = image_linear(node, site)
        except Refused as refused:
            yield before, refused.refusal
            yield after, refused.refusal
        else:
            yield before, operand(linear, 0)
            yield after, _anchor(linear, node, site)


def _network_places(site: SiteGraph, network: FeedForward) -> Iterator[tuple[Place, fx.Node | Refusal]]:
    path = site.plan.path
    yield "before_hidden", network.source
    one = len(network.hidden) == 1
    yield "after_hidden", network.hidden[0] if one else refusal(f"{path}: its hidden channels come from two Linears", network.hidden[1])
    yield "before_output", operand(network.output, 0)


def image_linear(node: fx.Node, site: SiteGraph) -> fx.Node:
    """Find the Linear that the image tokens of a query, key or value come from.

    Raises:
        Refused: there is not exactly one, or it does not map (batch, tokens, channels).
    """

    def has_image(at: fx.Node) -> bool:
        value = site.axes.get(at)
        return isinstance(value, list) or (isinstance(value, tuple) and any(map(is_image, value)))

    found = [at for at in upstream(node, enter=lambda at: not is_projection(at) and has_image(at)) if is_projection(at) and has_image(at)]
    if len(found) != 1:
        raise Refused(f"{site.plan.path}: {node.name} comes from {len(found)} projections of image tokens, not one", node)
    if _dims(operand(found[0], 0), site) is None:
        told = f"the input of {found[0].name} is not (batch, tokens, channels) in whatever order{_told_of_equal_sizes(site)}"
        raise Refused(f"{site.plan.path}: {told}", found[0])
    return found[0]


def _anchor(linear: fx.Node, last: fx.Node, site: SiteGraph) -> fx.Node:
    """Find the first node after the Linear, through views alone, that holds fewest numbers per token: this operand's part."""
    way = set(between(linear, last))
    best, node = linear, linear
    while True:
        users = [user for user in node.users if user in way]
        if len(users) != 1 or op_name(users[0]) not in VIEW_OPS:
            return best
        node = users[0]
        if isinstance(site.axes.get(node), tuple) and _numel(node) < _numel(best) and _dims(node, site) is not None:
            best = node


def _dims(node: fx.Node, site: SiteGraph) -> TokenDims | None:
    return token_dims(axes_of(node, site.axes), site.plan.grid_sizes)


def _channels(node: fx.Node, site: SiteGraph) -> int:
    dims, shape = _dims(node, site), shape_of(node) or ()
    assert dims is not None
    return math.prod(hint(shape[d]) for d in dims.rest)


def _numel(node: fx.Node) -> int:
    return math.prod(map(hint, shape_of(node) or ()))


# ------------------------------------------------------------------ the rewrite


def normalize_site(site: SiteGraph) -> int:
    """Free the graph of what capture froze, call the module's own submodules again; counts the nodes that are left."""
    site.graph = normalize(site.captured, site.module, core_nodes(site))
    site.axes = flow_axes(site.graph, lambda node: seed_axes(node, site.captured, site) if node.op == "placeholder" else None)
    if isinstance(site.core, Attention):
        site.core = _only_attention(site)
        site.places = dict(_attention_places(site, site.core))
    else:
        site.core = _only_network(site)
        site.places = dict(_network_places(site, site.core))
    return len(site.graph.nodes)


def core_nodes(site: SiteGraph) -> list[fx.Node]:
    """List the nodes that must not disappear in the call of a submodule."""
    if isinstance(site.core, Attention):
        return [site.core.node]
    return [*site.core.hidden, site.core.output] if site.core is not None else []


def insert_taps(site: SiteGraph) -> int:
    """Call the design's modules at their places; counts them."""
    last = [node for node in site.graph.nodes if node.op == "placeholder"][-1]
    with site.graph.inserting_after(last):
        site.grid = site.graph.placeholder("edit_grid")
    taps = {tap.where: tap for tap in site.taps}
    names = _tap_names(site)
    if isinstance(site.core, Attention):
        with site.graph.inserting_before(site.core.node):
            for (name, places), node in zip(_OPERANDS.items(), (site.core.query, site.core.key, site.core.value), strict=True):
                own = [taps[where] for where in places if where in taps]
                site.operands[name] = _tapped(site, node, own, names)
    else:
        network = site.core
        assert network is not None
        with site.graph.inserting_before(network.output):
            own = [taps[where] for where in ("before_hidden", "after_hidden", "before_output") if where in taps]
            site.operands["output"] = _tapped(site, operand(network.output, 0), own, names)
    return len(taps)


def _tap_names(site: SiteGraph) -> dict[int, str]:
    """Say where each tap's module is below the site, by identity."""
    return {id(module): f"{ADDED}.{path}" for path, module in site.chosen.named_modules()}


def _tapped(site: SiteGraph, target: fx.Node, taps: list[Tap], names: Mapping[int, str]) -> fx.Node:
    """Return the target behind taps at places on its way, in order."""
    changed: dict[fx.Node, fx.Node] = {}
    stride: tuple[int, ...] = ()
    for tap in taps:
        place = site.places[tap.where]
        assert isinstance(place, fx.Node)
        source = _cloner(site, changed, stride).clone(place) if changed else place
        stride = tap.stride or stride
        changed = {place: _call_tap(site, tap, names, place, source)}
    if not changed:
        return target
    cloner = _cloner(site, changed, stride)
    branch = cloner.clone(target)
    _read_dtypes_of_branch(site, cloner.changed)
    return branch


def _read_dtypes_of_branch(site: SiteGraph, branch: Mapping[fx.Node, fx.Node]) -> None:
    """Let what is cast to the dtype of a node behind attention, to the query's mostly, read it from the node's counterpart in the branch.

    The node itself would be computed for its dtype alone.
    """
    nodes = list(site.graph.nodes)
    for node in nodes[nodes.index(core_nodes(site)[-1]) :]:
        if node.target is aten.type_as.default and operand(node, 1) in branch:
            node.args = (operand(node, 0), branch[operand(node, 1)])


def _cloner(site: SiteGraph, changed: dict[fx.Node, fx.Node], stride: tuple[int, ...]) -> BranchCloner:
    assert site.grid is not None
    return BranchCloner(site.graph, site.axes, site.grid, dict(changed), stride, site.plan.grid_sizes)


def _call_tap(site: SiteGraph, tap: Tap, names: Mapping[int, str], place: fx.Node, source: fx.Node) -> fx.Node:
    """Call a tap's module on the image tokens of a tensor whatever its layout; other tokens stay.

    Args:
        place: the tensor as it was, whose axes are known.
        source: the tensor that takes its place.
    """
    shape, axes, graph = shape_of(place) or (), axes_of(place, site.axes), site.graph
    dims = _dims(place, site)
    assert dims is not None
    order = [dims.batch, *dims.tokens, *dims.rest]
    tokens, spread = source, len(dims.tokens)
    if order != list(range(len(shape))):
        tokens = graph.call_function(torch.permute, (tokens, order))
    if spread > 1:
        tokens = graph.call_function(torch.flatten, (tokens, 1, spread))
    if len(dims.rest) != 1:
        tokens = graph.call_function(torch.flatten, (graph.call_function(torch.unsqueeze, (tokens, -1)), 2))
    where = (0, 0) if spread > 1 else image_place(axes[dims.tokens[0]])
    tapped = _on_image_tokens(site, tap, names, tokens, where)
    if len(dims.rest) != 1:
        tapped = graph.call_function(torch.unflatten, (tapped, 2, [*(hint(shape[d]) for d in dims.rest), 1]))
        tapped = graph.call_function(torch.squeeze, (tapped, -1))
    if spread > 1:
        tapped = graph.call_function(torch.unflatten, (tapped, 1, graph.call_function(thinned_sizes, (site.grid, tap.stride))))
    if order != list(range(len(shape))):
        tapped = graph.call_function(torch.permute, (tapped, [order.index(d) for d in range(len(shape))]))
    tapped.meta = dict(place.meta)
    return tapped


def _on_image_tokens(site: SiteGraph, tap: Tap, names: Mapping[int, str], tokens: fx.Node, where: tuple[int | None, int | None]) -> fx.Node:
    graph, (before, after) = site.graph, where

    def call(image: fx.Node) -> fx.Node:
        if tap.form == "tokens":
            return graph.call_module(names[id(tap.module)], (image,))
        return graph.call_function(on_images, (graph.get_attr(names[id(tap.module)]), image, site.grid))

    if (before, after) == (0, 0):
        return call(tokens)
    parts = graph.call_function(cut_image, (tokens, 1, site.grid, before, after))
    front, image, back = (graph.call_function(operator.getitem, (parts, i)) for i in range(3))
    return graph.call_function(torch.cat, ([front, call(image), back], 1))


def replace_core(site: SiteGraph) -> int:
    """Put the design's module in the place of softmax attention, or the last tap's result before the last projection."""
    if isinstance(site.core, Attention):
        _replace_attention(site, site.core)
    else:
        assert site.core is not None
        output = site.core.output
        output.args = (site.operands["output"], *output.args[1:])
    remove_dead(site.graph)
    site.graph.lint()
    return 1


def _replace_attention(site: SiteGraph, attention: Attention) -> None:
    graph, stride = site.graph, next((tap.stride for tap in site.taps if tap.stride), ())
    with graph.inserting_before(attention.node):
        mask = _key_mask(site, attention) if site.plan.mask != "none" else None
        short = _sampled(site, mask, axes_of(attention.key, site.axes)[-2], stride) if stride and mask is not None else mask
        operands = tuple(site.operands[name] for name in _OPERANDS)
        own = (operands[0], attention.key, attention.value, mask)  # the model's own query would be computed for nothing
        original = graph.call_function(QKV, own) if site.chosen.needs_original else None
        x = graph.call_function(QKV, (*operands, short, original))
        keys = None
        if site.plan.key_layout != site.plan.query_layout:
            keys = graph.call_function(tokens_of, (attention.key, 2, site.grid, *_layout(site.plan.key_layout)))
        tokens = graph.call_function(tokens_of, (site.operands["query"], 2, site.grid, *_layout(site.plan.query_layout), keys))
        new = graph.call_module(ADDED, (x, tokens))
    new.meta = dict(attention.node.meta)
    attention.node.replace_all_uses_with(new)
    graph.erase_node(attention.node)


def _layout(layout: TokenLayout) -> tuple[tuple[str, ...], tuple[int | None, ...]]:
    """Return the kinds and lengths of a layout's segments: None for the image, and for what remains; unknown neighbours are one segment."""
    kinds: list[str] = []
    lengths: list[int | None] = []
    for segment in layout.segments:
        known = int(segment.length) if segment.length.isdigit() and segment.kind is not TokenKind.IMAGE else None
        if known is None and kinds and lengths[-1] is None and TokenKind.IMAGE not in (kinds[-1], segment.kind):
            continue
        kinds.append(str(segment.kind))
        lengths.append(known)
    return tuple(kinds), tuple(lengths)


def _key_mask(site: SiteGraph, attention: Attention) -> fx.Node | None:
    """Return the mask in four dimensions, with all keys in the last one, and in one row where it is the same for all queries."""
    mask, key = attention.mask, attention.key
    if mask is None:
        return None
    shape, keys = shape_of(mask) or (), (shape_of(key) or ())[2]
    if len(shape) == 4 and (hint(shape[-1]) > 1 or hint(keys) == 1):
        return _row(site, mask, mask)
    full = site.graph.call_function(as_key_mask, (mask, key))
    full.meta = {**mask.meta, "val": as_key_mask(mask.meta["val"], key.meta["val"])}
    return _row(site, mask, full)


def _row(site: SiteGraph, mask: fx.Node, full: fx.Node) -> fx.Node:
    """Return a mask with one row for all queries, where it is the same for all.

    Queries that are masked as a whole, as padding in front of the others, do not count: the row is that of the others.

    Args:
        full: the mask in four dimensions.
    """
    value: torch.Tensor = full.meta["val"]
    if site.plan.mask != "by_key" or hint(value.shape[-2]) == 1:
        return full
    if same_for_all_queries(mask, mask, but_masked=False):
        row = site.graph.call_function(aten.slice.Tensor, (full, -2, 0, 1))
    else:
        row = site.graph.call_function(aten.any.dim if value.dtype is torch.bool else aten.amax.default, (full, -2, True))
    row.meta = {**full.meta, "val": value[..., :1, :]}
    return row


def _sampled(site: SiteGraph, mask: fx.Node, keys: Axis, stride: tuple[int, ...]) -> fx.Node:
    """Sample a mask for thinned keys. Its last dimension is the keys', whatever the site makes it of."""
    return site.graph.call_function(sample_axis, (mask, 3, site.grid, *image_place(keys), stride))
