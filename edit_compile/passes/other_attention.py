"""Attention between image tokens that is not softmax attention as designs take it: what it is instead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from edit_compile.ir.tokens import TokenKind
from edit_compile.passes.axes.algebra import Axis, axis_size
from edit_compile.passes.classify_tokens import TokenMap
from edit_compile.passes.graph_walk import downstream, module_path, number, op_name, upstream
from edit_compile.passes.op_traits import is_pointwise
from edit_compile.passes.products import Names, Product, product_of, products
from edit_compile.passes.read_attention import SOFTMAXES, UNREAD

_ARITHMETIC = frozenset("add sub mul div neg to _to_copy type_as where masked_fill".split())  # noqa: SIM905


@dataclass(frozen=True)
class OtherAttention:
    """Attention of another form: its module, the axes of its queries and keys, and what it is.

    `is_quadratic` says whether its cost grows with the square of the number of image tokens.
    """

    node: fx.Node
    path: str
    rows: Axis
    columns: Axis
    reason: str
    is_quadratic: bool


def other_attention(graph: fx.Graph, tokens: TokenMap) -> Iterator[OtherAttention]:
    """Yield the attention of a canonical graph that is not one node, each module once for each form."""
    unread = list(_unread(graph, tokens))
    yield from unread
    seen = {found.path for found in unread}
    behind = downstream({found.node for found in unread}, graph)  # the product with the values is part of what was not read
    for product in products(graph):
        found = _by_product(product, tokens) if product.left not in behind and product.right not in behind else None
        if found is not None and found.path not in seen:
            seen.add(found.path)
            yield found


def _unread(graph: fx.Graph, tokens: TokenMap) -> Iterator[OtherAttention]:
    """Yield softmax between image tokens that could not be read as attention."""
    seen: set[str] = set()
    for node in graph.nodes:
        axes, path, why = tokens.axes.get(node), module_path(node), node.meta.get(UNREAD)
        if (op_name(node) not in SOFTMAXES and why is None) or not isinstance(axes, tuple) or path in seen:
            continue
        column = number(node, 1, "dim") % len(axes) if op_name(node) in SOFTMAXES else len(axes) - 1
        batch = 0 if len(axes) > len(("rows", "columns")) else None
        rows = [axis for dim, axis in enumerate(axes) if dim not in (batch, column) and _has_image(axis, tokens)]
        if rows and _has_image(axes[column], tokens):
            seen.add(path)
            reason = f"softmax attention in a form that is not recognised{': ' if why else ''}{why or ''}"
            yield OtherAttention(node, path, rows[-1], axes[column], reason, is_quadratic=True)


def _by_product(product: Product, tokens: TokenMap) -> OtherAttention | None:
    """Read a product that sums over image tokens; None if it is no attention."""
    left, right = tokens.axes.get(product.left), tokens.axes.get(product.right)
    if not isinstance(left, tuple) or not isinstance(right, tuple):
        return None
    images = [_images(names, axes, tokens) for names, axes in ((product.left_names, left), (product.right_names, right))]
    summed = [name for name in product.summed if name in images[0] and name in images[1]]
    if not summed:
        return None
    column = left[product.left_names.index(summed[0])]
    for weights, names, axes in ((product.left, images[0], left), (product.right, images[1], right)):
        free = [name for name in names if name not in summed and name not in product.of(product.other(weights))]
        if free:
            reason = _other_weights(weights)
            rows = axes[product.of(weights).index(free[0])]
            return OtherAttention(product.node, module_path(product.node), rows, column, reason, is_quadratic=True) if reason else None
    reason = _summary_of_tokens(product.node, tokens)
    return OtherAttention(product.node, module_path(product.node), column, column, reason, is_quadratic=False) if reason else None


def _images(names: Names, axes: tuple[Axis, ...], tokens: TokenMap) -> list[str]:
    return [name for name, axis in zip(names, axes, strict=True) if _has_image(axis, tokens)]


def _has_image(axis: Axis, tokens: TokenMap) -> bool:
    return tokens.layout(axis)[0].has(TokenKind.IMAGE) and axis_size(axis) > 1


def _other_weights(weights: fx.Node) -> str | None:
    """Say what weights between image tokens are, if they come from scores; None for a table, which is no attention."""
    way = list(upstream(weights, enter=lambda at: product_of(at) is None and at.op == "call_function"))
    if not any(product_of(at) is not None for at in way):
        return None
    names = [op_name(at).rstrip("_") for at in reversed(way) if is_pointwise(at) and op_name(at).rstrip("_") not in _ARITHMETIC]
    by = f": they are made by {', '.join(dict.fromkeys(names))}" if names else ": they are the scores themselves"
    return f"attention whose weights are no softmax of the scores{by}"


def _summary_of_tokens(node: fx.Node, tokens: TokenMap) -> str | None:
    """Say what a sum over the image tokens is for: linear attention, or attention between channels; None if no token sees it again."""
    reached, softmax = {node}, False
    at = node.next
    while at.op != "root":
        sources = [each for each in at.all_input_nodes if each in reached]
        if sources:
            product = product_of(at)
            others = [each for each in at.all_input_nodes if each not in reached]
            if product is not None and any(_by_token(each, tokens) for each in others):
                return CHANNELS if softmax else _LINEAR
            axes = tokens.axes.get(at)
            if isinstance(axes, list) or (isinstance(axes, tuple) and not any(_has_image(axis, tokens) for axis in axes)):
                reached.add(at)
                softmax = softmax or op_name(at) in SOFTMAXES
        at = at.next
    return None


def _by_token(node: fx.Node, tokens: TokenMap) -> bool:
    axes = tokens.axes.get(node)
    return isinstance(axes, tuple) and any(_has_image(axis, tokens) for axis in axes)


_LINEAR = "already linear attention: keys and values are summed over the image tokens"
CHANNELS = "attention between channels, not between tokens: linear in image tokens already"
