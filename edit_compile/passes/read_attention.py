"""Softmax attention written by hand, read from its softmax: back to queries, keys and masks, on to the product with values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from edit_compile.passes.einsum import Names
from edit_compile.passes.graph_walk import argument, number, numbers, op_name, operand
from edit_compile.passes.products import Product, keeps_dim, permutation, product_of, rank
from edit_compile.passes.read_scores import NEUTRAL, NotRead, Placed, Scores, read_scores, regroup

aten = torch.ops.aten
SOFTMAXES = ("softmax", "_softmax", "_safe_softmax")
UNREAD = "unread_attention"  # in a softmax node's meta: why it could not be read
_RESHAPES = ("view", "reshape", "_unsafe_view", "unflatten", "flatten", "_reshape_alias", "unsqueeze", "squeeze")
_SMALL = 1e-3  # what may be added to a sum of weights against division by zero


@dataclass(frozen=True)
class Normalized:
    """Weights that sum to one over one dimension of the scores.

    Attributes:
        node: the softmax, or what computes the same.
        scores: that enter.
        dim: that is summed over.
        weights: where the product with the values is looked for: `node`, or the exponentials if the sum divides afterwards.
        total: the sum, if it divides afterwards.
    """

    node: fx.Node
    scores: fx.node.Argument
    dim: int
    weights: fx.Node
    total: fx.Node | None = None


@dataclass(frozen=True)
class ReadAttention:
    """Attention: what to compute, and the node that it computes.

    Attributes:
        scores: scale, factors and masks of the product of `query` and `key`.
        query, key, value: with the names of their dimensions.
        row, column, depth, width: names of the queries', keys', summed channels' and values' channels' dimension.
        gates: tensors that multiply the weights, the same for all keys.
        result: the node to replace, and `names` of its dimensions.
    """

    scores: Scores
    query: Placed
    key: Placed
    value: Placed
    row: str
    column: str
    depth: str
    width: str
    gates: tuple[Placed, ...]
    scale_after: float
    result: fx.Node
    names: Names
    composed: Mapping[str, tuple[str, str, Any]]


def normalized(graph: fx.Graph) -> Iterator[Normalized]:
    """Yield every softmax of a graph, by name or by hand."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            continue
        if op_name(node) in SOFTMAXES:
            yield Normalized(node, node.args[0], number(node, 1, "dim"), node)
        elif op_name(node) == "exp" and (found := _by_exponentials(node)) is not None:
            yield found


def _by_exponentials(exp: fx.Node) -> Normalized | None:
    """Read exp(log_softmax(s)), exp(s - logsumexp(s)), exp(s) / sum(exp(s)) and (exp(s) @ v) / sum(exp(s))."""
    inner = _through_casts(operand(exp, 0))
    if op_name(inner) in ("log_softmax", "_log_softmax"):
        return Normalized(exp, inner.args[0], number(inner, 1, "dim"), exp)
    if op_name(inner) == "sub" and isinstance(inner.args[1], fx.Node):
        total = _through_casts(inner.args[1])
        if op_name(total) == "logsumexp" and keeps_dim(total, 2) and total.args[0] is inner.args[0] and len(numbers(total, 1)) == 1:
            return Normalized(exp, inner.args[0], numbers(total, 1)[0], exp)
    return _divided_by_sum(exp)


def _divided_by_sum(exp: fx.Node) -> Normalized | None:
    """Read exponentials that are divided by their sum, before or after the product with the values."""
    weights = exp
    while len(weights.users) == 1 and op_name(next(iter(weights.users))) in NEUTRAL:
        weights = next(iter(weights.users))
    sums = [user for user in weights.users if op_name(user) == "sum" and argument(user, 1, "dim") is not None]
    others = [user for user in weights.users if user not in sums]
    if len(sums) != 1 or len(numbers(sums[0], 1, "dim")) != 1 or len(others) != 1:
        return None
    dim, totals = numbers(sums[0], 1, "dim")[0], _totals(sums[0])
    if op_name(others[0]) == "div" and others[0].args[0] is weights and others[0].args[1] in totals:
        return Normalized(others[0], exp.args[0], dim, others[0])
    return Normalized(exp, exp.args[0], dim, weights, sums[0])


def _totals(node: fx.Node) -> set[Any]:
    """Collect what a sum is called on its way to a division: with a small number added, or a lower bound."""
    found, pending = {node}, [node]
    while pending:
        for user in pending.pop().users:
            name = op_name(user)
            small = name in ("add", "clamp", "clamp_min") and isinstance(argument(user, 1, "min"), int | float)
            small = small and abs(argument(user, 1, "min")) <= _SMALL
            if small or name in NEUTRAL or name in ("unsqueeze", "view", "reshape", "expand", "transpose", "permute"):
                found.add(user)
                pending.append(user)
    return found


def _through_casts(node: fx.Node) -> fx.Node:
    while op_name(node) in NEUTRAL:
        node = operand(node, 0)
    return node


def read_attention(found: Normalized) -> ReadAttention:
    """Read the attention that a softmax belongs to.

    Raises:
        NotRead: it is none, or is written in a way that is not understood; says what stands in the way.
    """
    scores = read_scores(found.scores)
    column = scores.names[found.dim % len(scores.names)]
    walk = _Walk(found.weights, scores.names, scores.composed)
    product = walk.to_product(scores, column, found)
    value = product.other(walk.at)
    renamed = dict(zip(product.of(walk.at), walk.names, strict=True))
    value_names = tuple(renamed.get(name, f"v:{name}") for name in product.of(value))
    names = tuple(renamed.get(name, f"v:{name}") for name in product.names)
    if [renamed.get(name) for name in product.summed] != [column]:
        raise NotRead("the product after its softmax sums over another dimension than the softmax (as talking heads do)")
    query, key = _query_and_key(scores, column)
    row, depth = _row(query, key), _depth(scores.product)
    own = [name for name in value_names if name.startswith("v:")]
    if len(own) != 1 or own[0] not in names or row not in names:
        raise NotRead("its values have no channels of their own, or several dimensions of them")
    result = product.node if found.total is None else _division(product, found.total)
    return ReadAttention(
        _for_a_row(scores, column, row),
        query, key, Placed(value, value_names),
        row, column, depth, own[0],
        walk.gates, walk.scale, result, names, walk.composed,
    )  # fmt: skip


def _division(product: Product, total: fx.Node) -> fx.Node:
    """Find the division of a product with the values by the weights' sum."""
    node = product.node
    while len(node.users) == 1:
        user = next(iter(node.users))
        if op_name(user) == "div" and user.args[0] is node and user.args[1] in _totals(total):
            return user
        if op_name(user) not in NEUTRAL:
            break
        node = user
    raise NotRead("its weights are exponentials that are not divided by their sum")


def _query_and_key(scores: Scores, column: str) -> tuple[Placed, Placed]:
    """Tell the operands of the scores' product apart: the key's tokens are what the softmax runs over."""
    product = scores.product
    left, right = Placed(product.left, product.left_names), Placed(product.right, product.right_names)
    for query, key in ((left, right), (right, left)):
        if [name for name in key.names if name in product.names and name not in query.names] == [column]:
            return query, key
    raise NotRead("the product before its softmax does not pair queries with keys (as talking heads mix the scores of heads)")


def _row(query: Placed, key: Placed) -> str:
    """Find the queries' dimension: what keys do not have; of several, as with one key for all heads, the one of no fixed size."""
    free = [name for name in query.names if name not in key.names]
    if len(free) > 1:
        sizes = dict(zip(query.names, query.node.meta["val"].shape, strict=True))
        free = [name for name in free if not isinstance(sizes[name], int)] or free[-1:]
    if len(free) != 1:
        raise NotRead("its queries have no dimension of tokens of their own, or several")
    return free[0]


def _depth(product: Product) -> str:
    if len(product.summed) != 1:
        raise NotRead("its queries and keys are multiplied over several dimensions")
    return product.summed[0]


def _for_a_row(scores: Scores, column: str, row: str) -> Scores:
    """Drop what is added to all scores of a query: the softmax does not change, whatever it is, such as their maximum."""
    masks = tuple(mask for mask in scores.masks if mask.form != "added" or mask.has(column))
    if any(factor.has(row) and factor.has(column) for factor in scores.factors):
        raise NotRead("its scores are weighted pair by pair before the softmax: not the softmax of a scaled product")
    return replace(scores, masks=masks)


# ------------------------------------------------------------------ on to the values


@dataclass
class _Walk:
    """The way from normalized weights to their product with the values."""

    at: fx.Node
    names: Names
    composed: Mapping[str, tuple[str, str, Any]]
    gates: tuple[Placed, ...] = ()
    scale: float = 1.0

    def to_product(self, scores: Scores, column: str, found: Normalized) -> Product:
        """Follow the weights through casts, dropout and reordered dimensions."""
        while True:
            user = self._only_user(found)
            product = product_of(user)
            if product is not None:
                if product.left is product.right or column not in self.names:
                    raise NotRead("its weights are multiplied by themselves")
                return product
            self._step(user, scores, column)
            self.at = user

    def _only_user(self, found: Normalized) -> fx.Node:
        users = [user for user in self.at.users if user is not found.total]
        if len(users) == 1 and users[0].op == "call_function":
            return users[0]
        if any(user.op == "output" for user in users):
            raise NotRead("its attention weights are returned, and linear attention has none")
        others = ", ".join(op_name(user) for user in users if product_of(user) is None)
        raise NotRead(f"its attention weights are used for more than the sum of the values ({others or 'several products'})")

    def _step(self, user: fx.Node, scores: Scores, column: str) -> None:
        name = op_name(user)
        if name in NEUTRAL or name == "nan_to_num":
            if user.args[0] is not self.at:
                raise NotRead(f"its attention weights go into {name}")
        elif (order := permutation(user)) is not None:
            self.names = tuple(self.names[dim] for dim in order)
        elif name in _RESHAPES:
            self._reshape(user)
        elif name in ("mul", "div"):
            self._scale(user, name, column)
        elif not (name == "masked_fill" and user.args[2] == 0 and any(mask.node is user.args[1] for mask in scores.masks)):
            what = "are mixed" if name.startswith(("conv", "linear", "batch_norm")) else "go"
            raise NotRead(
                f"its attention weights {what} through {name} after the softmax{' (talking heads)' if what == 'are mixed' else ''}"
            )

    def _reshape(self, user: fx.Node) -> None:
        if op_name(user) == "unsqueeze":
            dim = number(user, 1, "dim") % rank(user)
            self.names = (*self.names[:dim], f"1@{user.name}", *self.names[dim:])
        elif op_name(user) == "squeeze":
            dim = number(user, 1, "dim") % len(self.names)
            self.names = (*self.names[:dim], *self.names[dim + 1 :]) if rank(user) < len(self.names) else self.names
        else:
            self.names, self.composed = regroup(user, self.names, self.composed)

    def _scale(self, user: fx.Node, name: str, column: str) -> None:
        first, second = user.args[0], user.args[1]
        factor = second if first is self.at else first
        if isinstance(factor, int | float) and (name == "mul" or first is self.at):
            self.scale *= factor if name == "mul" else 1 / factor
            return
        if isinstance(factor, fx.Node) and isinstance(factor.meta.get("val"), Tensor) and name == "mul" and rank(factor) <= len(self.names):
            gate = Placed(factor, self.names[len(self.names) - rank(factor) :])
            if not gate.has(column):
                self.gates = (*self.gates, gate)
                return
        raise NotRead("its attention weights are weighted after the softmax")
