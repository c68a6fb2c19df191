"""Look at a converted model's own graph: is what the plan promises true of what would run?

Checked at every rewritten site: no softmax attention between image tokens is left, and no operation multiplies image
tokens by image tokens, so that the site's cost per image token does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import fx

from edit_compile.ir.tokens import TokenKind
from edit_compile.passes.axes.algebra import Axis, axis_size
from edit_compile.passes.canonicalize import canonicalize
from edit_compile.passes.capture import Capture
from edit_compile.passes.classify_tokens import Tokens, classify_tokens
from edit_compile.passes.find_attention import module_path
from edit_compile.passes.op_traits import name_of

_PRODUCTS = ("matmul", "bmm", "mm", "baddbmm", "addmm", "einsum")
_SOFTMAX_ATTENTION = "scaled_dot_product"  # in the name of every kernel for it


@dataclass(frozen=True)
class Audit:
    """`products` counts the operations looked at; `findings` says what is wrong, one line each: empty is good."""

    sites: int
    products: int
    findings: tuple[str, ...]


def audit(captured: Capture, rewritten: Sequence[str]) -> Audit:
    """Audit the captured graph of a converted model.

    Args:
        captured: the converted model, captured anew.
        rewritten: the paths of its rewritten sites.
    """
    canonicalize(captured.graph)
    tokens = classify_tokens(captured)
    seen: dict[str, int] = dict.fromkeys(rewritten, 0)
    findings = []
    for node in captured.graph.nodes:
        site = _site_of(node, seen)
        if site is None or not _is_product(node):
            continue
        seen[site] += 1
        pairs = list(_image_by_image(node, tokens))
        if pairs:
            what = "softmax attention" if _SOFTMAX_ATTENTION in name_of(node) else name_of(node)
            findings.append(f"{site}: {what} ({node.name}) multiplies {pairs[0][0]} image tokens by {pairs[0][1]}")
    findings += [f"{site}: no attention was found at it" for site, count in seen.items() if not count]
    return Audit(len(seen), sum(seen.values()), tuple(findings))


def _site_of(node: fx.Node, sites: dict[str, int]) -> str | None:
    path = module_path(node)
    while path and path not in sites:
        path = path.rpartition(".")[0]
    return path or None


def _is_product(node: fx.Node) -> bool:
    return node.op == "call_function" and (_SOFTMAX_ATTENTION in name_of(node) or name_of(node) in _PRODUCTS)


def _image_by_image(node: fx.Node, tokens: Tokens) -> Iterator[tuple[int, int]]:
    """Pairs of axes with more than one image token among those that the operation runs over: rows, columns, summed."""
    for a, b in _axes_run_over(node, tokens):
        if _image_tokens(a, tokens) > 1 and _image_tokens(b, tokens) > 1:
            yield _image_tokens(a, tokens), _image_tokens(b, tokens)


def _axes_run_over(node: fx.Node, tokens: Tokens) -> Iterable[tuple[Axis, Axis]]:
    name = name_of(node)
    if name == "einsum":
        return combinations(_einsum_axes(node, tokens), 2)
    left, right = (tokens.axes[operand] for operand in (node.args[:2] if _SOFTMAX_ATTENTION in name else node.args[-2:]))
    if _SOFTMAX_ATTENTION in name:
        return [(left[-2], right[-2])]
    return [] if min(len(left), len(right)) < 2 else [(left[-2], left[-1]), (left[-2], right[-1]), (right[-2], right[-1])]


def _einsum_axes(node: fx.Node, tokens: Tokens) -> list[Axis]:
    """The axis of every letter but those of the batch, which all operands and the result have."""
    terms, _, result = str(node.args[0]).replace(" ", "").partition("->")
    letters = {s: a for term, n in zip(terms.split(","), node.args[1], strict=True) for s, a in zip(term, tokens.axes[n], strict=False)}
    batch = set(result).intersection(*terms.split(","))
    return [axis for letter, axis in letters.items() if letter not in batch]


def _image_tokens(axis: Axis, tokens: Tokens) -> int:
    """How many image tokens an axis holds; a channel axis has none, whatever it was computed from."""
    return axis_size(tuple(piece for piece in axis if tokens.kind(piece) is TokenKind.IMAGE))
