"""Attention between image tokens that is not softmax attention as designs take it: what it is instead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from edit_compile.ir.tokens import TokenKind
from edit_compile.passes.axes.algebra import Axis, axis_size, hint
from edit_compile.passes.axes.rules import MOVING
from edit_compile.passes.classify_tokens import TokenMap
from edit_compile.passes.einsum import Names
from edit_compile.passes.graph_walk import argument, module_path, number, op_name, shape_of, upstream
from edit_compile.passes.op_traits import is_pointwise
from edit_compile.passes.products import Product, product_of, rank
from edit_compile.passes.read_attention import SOFTMAXES, UNREAD

_DISTANCES = ("cdist", "_cdist_forward", "_euclidean_dist")
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
    own = _products_with_values({found.node for found in unread}, graph, tokens)
    others = (found for product in _products(graph) if product.node not in own and (found := _by_product(product, tokens)) is not None)
    seen: set[tuple[str, str]] = set()
    order = {node: at for at, node in enumerate(graph.nodes)}
    for found in sorted((*unread, *others), key=lambda found: order[found.node]):
        if (found.path, found.reason) not in seen:
            seen.add((found.path, found.reason))
            yield found


def _unread(graph: fx.Graph, tokens: TokenMap) -> Iterator[OtherAttention]:
    """Yield softmax between image tokens that could not be read as attention."""
    for node in graph.nodes:
        axes, why = tokens.axes.get(node), node.meta.get(UNREAD)
        if (op_name(node) not in SOFTMAXES and why is None) or not isinstance(axes, tuple):
            continue
        column = number(node, 1, "dim") % len(axes) if op_name(node) in SOFTMAXES else len(axes) - 1
        batch = 0 if len(axes) > len(("rows", "columns")) else None
        rows = [axis for dim, axis in enumerate(axes) if dim not in (batch, column) and _has_image(axis, tokens)]
        if rows and _has_image(axes[column], tokens):
            reason = f"softmax attention in a form that is not recognised{': ' if why else ''}{why or ''}"
            yield OtherAttention(node, module_path(node), rows[-1], axes[column], reason, is_quadratic=True)


def _products_with_values(weights: set[fx.Node], graph: fx.Graph, tokens: TokenMap) -> set[fx.Node]:
    """Find where weights that were not read meet their values, which is a part of the attention that they are of.

    They are followed as far as they pair tokens: what has summed over one of a pair is no weight any more.
    """
    pairs = {node: _image_dims(node, tokens) for node in weights}
    found: set[fx.Node] = set()
    for node in graph.nodes:
        from_weights = [pairs[each] for each in node.all_input_nodes if each in pairs]
        if not from_weights or node in pairs:
            continue
        if _image_dims(node, tokens) >= min(from_weights):
            pairs[node] = min(from_weights)
        else:
            found.add(node)
    return found


def _products(graph: fx.Graph) -> Iterator[Product]:
    """Yield every product of two tensors, those too that are written as the sum of a product number by number."""
    for node in graph.nodes:
        found = product_of(node) or _summed_multiplication(node)
        if found is not None:
            yield found


def _summed_multiplication(node: fx.Node) -> Product | None:
    """Read (a * b).sum(dim), a and b broadcast against each other."""
    inner = node.args[0] if op_name(node) == "sum" and node.args else None
    dims = argument(node, 1, "dim")
    if not isinstance(inner, fx.Node) or op_name(inner) != "mul" or not isinstance(dims, list | tuple):
        return None
    given = [each for each in inner.args[:2] if isinstance(each, fx.Node) and shape_of(each)]
    if len(given) != len(("left", "right")):
        return None
    left, right = (_broadcast_names(each, rank(inner)) for each in given)
    summed = {dim % rank(inner) for dim in dims}
    names = tuple(f"{dim}" for dim in range(rank(inner)) if dim not in summed)
    return Product(node, given[0], given[1], left, right, names)


def _broadcast_names(node: fx.Node, dims: int) -> Names:
    """Name an operand's dimensions by their place in the result; those of size 1 have names of their own."""
    first = dims - rank(node)
    return tuple(f"{first + at}" if hint(size) != 1 else f"1@{node.name},{at}" for at, size in enumerate(node.meta["val"].shape))


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
            reason = _other_weights(weights, tokens)
            rows = axes[product.of(weights).index(free[0])]
            return OtherAttention(product.node, module_path(product.node), rows, column, reason, is_quadratic=True) if reason else None
    reason = _summary_of_tokens(product.node, tokens) if product_of(product.node) is not None else None
    return OtherAttention(product.node, module_path(product.node), column, column, reason, is_quadratic=False) if reason else None


def _images(names: Names, axes: tuple[Axis, ...], tokens: TokenMap) -> list[str]:
    return [name for name, axis in zip(names, axes, strict=True) if _has_image(axis, tokens)]


def _has_image(axis: Axis, tokens: TokenMap) -> bool:
    return tokens.layout(axis)[0].has(TokenKind.IMAGE) and axis_size(axis) > 1


def _other_weights(weights: fx.Node, tokens: TokenMap) -> str | None:
    """Say what weights between image tokens are, if they pair what the tokens hold; None for a table, which is no attention."""
    dims = _image_dims(weights, tokens)

    def pairs(node: fx.Node) -> bool:
        fewer = all(_image_dims(each, tokens) < _image_dims(node, tokens) for each in node.all_input_nodes)
        return fewer and node.op == "call_function" and op_name(node) not in MOVING

    found = upstream(weights, enter=lambda at: not pairs(at) and _image_dims(at, tokens) >= dims)
    way = [at for at in found if _image_dims(at, tokens) >= dims]
    if not any(map(pairs, way)):
        return None
    made_by = [op_name(at).rstrip("_") for at in reversed(way) if is_pointwise(at) or op_name(at) in _DISTANCES]
    names = [name for name in made_by if name not in _ARITHMETIC]
    by = f": they are made by {', '.join(dict.fromkeys(names))}" if names else ": they are the scores themselves"
    return f"attention whose weights are no softmax of the scores{by}"


def _image_dims(node: fx.Node, tokens: TokenMap) -> int:
    """Count the dimensions of image tokens that a tensor has, those that were merged too."""
    axes = tokens.axes.get(node)
    return sum(_image_parts(axis, tokens) for axis in axes) if isinstance(axes, tuple) else 0


def _image_parts(axis: Axis, tokens: TokenMap) -> int:
    parts = [sum(_image_parts(inner, tokens) for inner in segment.composed_of) or 1 for segment in axis if _has_image((segment,), tokens)]
    return max(parts, default=0)


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
