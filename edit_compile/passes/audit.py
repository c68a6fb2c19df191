"""Look at a rewritten graph: is what the plan promises true of what would run?

No operation at a rewritten site multiplies image tokens by image tokens, unless its design answers for that many by that
many: so the site's cost per image token does not grow with their number. Looked at in two places: at every distinct site
while it is compiled, and in the whole converted model, captured anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, product

import torch
from torch import Tensor, fx

from edit_compile.config import parse_options
from edit_compile.designs import find_design
from edit_compile.errors import AuditError, CaptureError
from edit_compile.ir.plan import SitePlan
from edit_compile.ir.tokens import TokenKind
from edit_compile.passes.axes.algebra import Axes, Axis, axes_of, axis_size, hint, new_axis, sources_of
from edit_compile.passes.axes.propagate import flow_axes
from edit_compile.passes.build_design import check_output, design_code
from edit_compile.passes.canonicalize import canonicalize
from edit_compile.passes.capture import Capture, capture, what_failed
from edit_compile.passes.classify_tokens import TokenMap, classify_tokens
from edit_compile.passes.einsum import dimension_names
from edit_compile.passes.forward_alone import forward_alone
from edit_compile.passes.graph_walk import module_path, op_name, operand, operands, shape_of
from edit_compile.passes.site_axes import seed_axes
from edit_compile.passes.site_graph import ADDED, IMAGE_SOURCE, Refused, SiteGraph, example_grid

_PRODUCTS = ("matmul", "bmm", "mm", "baddbmm", "addmm", "einsum")
_CONVOLUTIONS = "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution".split()  # noqa: SIM905
_MOST_TOKENS = 2**20  # of an image that is made larger until its design does not allow all by all
_SOFTMAX_ATTENTION = "scaled_dot_product"  # in the name of every kernel for it

Allows = Callable[[int, int], bool]  # may one product pair so many image tokens with so many?


@dataclass(frozen=True)
class Audit:
    """`products` counts the operations looked at; `findings` says what is wrong, one line each: empty is good."""

    sites: int
    products: int
    findings: tuple[str, ...]


def allowed_at(site: SitePlan) -> Allows:
    """Ask a planned site's design.

    Raises:
        ConfigError: the design or one of its options is not known.
    """
    design, grid = find_design(site.action), example_grid(site)
    options = parse_options(design, site.options)
    return lambda rows, columns: design.allows(rows, columns, grid, options)


def audit(captured: Capture, rewritten: Mapping[str, Allows]) -> Audit:
    """Audit the captured graph of a converted model.

    Args:
        captured: the converted model, captured anew.
        rewritten: what is allowed at each of its rewritten attention sites, by path.
    """
    canonicalize(captured.graph)
    tokens = _image_positions(captured)
    seen: set[str] = set()
    products, findings = 0, []
    for node in captured.graph.nodes:
        site = _site_of(node, rewritten)
        if site is None or node.op != "call_function":
            continue
        seen.add(site)
        if _is_product(node, tokens):
            products += 1
            findings += [f"{site}: {finding}" for finding in _forbidden(node, tokens, rewritten[site])]
    findings += [f"{site}: no attention was found at it" for site in rewritten if site not in seen]
    return Audit(len(rewritten), products, tuple(findings))


def _image_positions(captured: Capture) -> TokenMap:
    """Follow the dimensions of the inputs that carry the image, each by itself: those that the output's positions stem from.

    A table of rotations that is an input is the image's by its rows, not by its channels.
    """
    images = classify_tokens(captured).image_inputs
    inputs = [node for node in captured.graph.nodes if node.op == "placeholder" and node.name in images]

    def seed(node: fx.Node) -> Axes | None:
        shape = shape_of(node) or ()
        return tuple(new_axis(size, _dimension(node, d)) for d, size in enumerate(shape)) if node in inputs else None

    axes = flow_axes(captured.graph, seed)
    outputs = [found for node in captured.graph.output_node().all_input_nodes if isinstance(found := axes.get(node), tuple)]
    carried = sources_of(axis for output in outputs if len(output) >= 3 for axis in output[1:])  # (batch, channels) has no positions
    positions: set[str] = set()
    for node in inputs:
        dims = [_dimension(node, d) for d in range(len(shape_of(node) or ()))]
        positions.update(carried.intersection(dims) or dims)
    return TokenMap(axes, frozenset(positions))


def _dimension(node: fx.Node, dim: int) -> str:
    return f"{node.name}, dimension {dim}"


def audit_site(site: SiteGraph) -> int:
    """Capture the rewritten site again and audit it; counts the products looked at.

    Raises:
        AuditError: it multiplies image tokens by image tokens, and its design does not allow so many by so many.
        Refused: the rewritten site cannot run, or its design returns something else than attention output.
    """
    grid = example_grid(site.plan)
    again = _captured_again(site, grid)
    found, wanted = _result_shapes(again.graph), _result_shapes(site.captured.graph)
    if found != wanted:
        raise Refused(f"rewritten, the site returns tensors of shapes {found}, not {wanted}")
    canonicalize(again.graph)
    tokens = TokenMap(flow_axes(again.graph, lambda node: seed_axes(node, again, site)), frozenset({IMAGE_SOURCE}))
    with design_code(site, "allows"):
        products, findings = _judged(again.graph, tokens, site, grid)
        larger = _larger_grid(site, grid)
    if not findings and larger is not None and site.plan.kind == "attention":
        _, findings = _judged(*forward_alone(site, larger), site, larger)
    if findings:
        name = site.chosen.name
        raise AuditError(f"{site.plan.path}: the design {name!r} is not what it says: {findings[0]}, which its `allows` refuses")
    return products


def _judged(graph: fx.Graph, tokens: TokenMap, site: SiteGraph, grid: tuple[int, ...]) -> tuple[int, list[str]]:
    """Count the products of a graph, and list what is wrong with it where the image tokens are on that grid."""

    def allows(rows: int, columns: int) -> bool:
        return site.chosen.allows(rows, columns, grid, site.choice.options)

    products = [node for node in graph.nodes if _is_product(node, tokens)]
    findings = [finding for node in products for finding in _forbidden(node, tokens, allows)]
    if not allows(math.prod(grid), math.prod(grid)):
        findings += _all_by_all(graph, tokens, math.prod(grid))
    return len(products), findings


def _larger_grid(site: SiteGraph, grid: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return a multiple of the example's grid on which the design does not allow all by all, if it does on the example's, as windows do."""
    larger, options = grid, site.choice.options
    while site.chosen.allows(math.prod(larger), math.prod(larger), larger, options):
        larger = tuple(2 * n for n in larger)
        if math.prod(larger) > _MOST_TOKENS:
            return None
    return larger if larger != grid else None


def _captured_again(site: SiteGraph, grid: tuple[int, ...]) -> Capture:
    hook = site.chosen.register_forward_hook(check_output) if site.plan.kind == "attention" else None
    try:
        return capture(_probe(site, grid), site.arguments, cast=False, symbolic=False, probes=(site.captured.probe,))
    except CaptureError as error:
        cause = error.__cause__
        if isinstance(cause, Refused):
            raise cause from None
        assert isinstance(cause, Exception)
        raise Refused(f"rewritten with the design {site.chosen.name!r} the site cannot run: {what_failed(cause)}") from cause
    finally:
        if hook is not None:
            hook.remove()


def _result_shapes(graph: fx.Graph) -> list[list[int]]:
    return [[hint(size) for size in shape] for node in graph.output_node().all_input_nodes if (shape := shape_of(node)) is not None]


def _probe(site: SiteGraph, grid: tuple[int, ...]) -> torch.nn.Module:
    """Make the site's module as conversion would make it, for one grid, without a teacher."""
    shape: Tensor = torch.empty((), device="meta").expand(grid)
    methods = {
        "forward": site.forward,
        "edit_path": site.plan.path,
        "edit_teacher_is_on": lambda module: False,
        "edit_current_grid": lambda module: shape,
    }
    probe: torch.nn.Module = object.__new__(type(type(site.module).__name__, (type(site.module),), methods))
    probe.__dict__ = {**site.module.__dict__, "_modules": {**site.module._modules, ADDED: site.chosen}}
    return probe


def _site_of(node: fx.Node, sites: Mapping[str, Allows]) -> str | None:
    path = module_path(node)
    while path and path not in sites:
        path = path.rpartition(".")[0]
    return path or None


def _is_product(node: fx.Node, tokens: TokenMap) -> bool:
    """Say whether a node multiplies tensors; a linear or convolutional layer does if its weight is made of image tokens."""
    name = op_name(node)
    if node.op != "call_function" or _SOFTMAX_ATTENTION in name or name in _PRODUCTS:
        return node.op == "call_function"
    weight = tokens.axes.get(operand(node, 1)) if name == "linear" or name in _CONVOLUTIONS else None
    return isinstance(weight, tuple) and any(_image_tokens(axis, tokens) > 1 for axis in weight)


def _forbidden(node: fx.Node, tokens: TokenMap, allows: Allows) -> Iterator[str]:
    """Say what is wrong with a product: axes with image tokens among those that it runs over (rows, columns, summed)."""
    for a, b in _axes_run_over(node, tokens):
        rows, columns = _image_tokens(a, tokens), _image_tokens(b, tokens)
        if rows > 1 and columns > 1 and not allows(rows, columns):
            what = "softmax attention" if _SOFTMAX_ATTENTION in op_name(node) else op_name(node)
            yield f"{what} ({node.name}) multiplies {rows} image tokens by {columns}"
            return


def _all_by_all(graph: fx.Graph, tokens: TokenMap, count: int) -> Iterator[str]:
    """Find what is quadratic without a matrix product: tensors with two dimensions that hold all image tokens each."""
    for node in graph.nodes:
        axes = tokens.axes.get(node)
        if node.op == "call_function" and isinstance(axes, tuple) and sum(_image_tokens(axis, tokens) >= count for axis in axes) > 1:
            yield f"{op_name(node)} ({node.name}) pairs {count} image tokens with {count}"


def _axes_run_over(node: fx.Node, tokens: TokenMap) -> Iterable[tuple[Axis, Axis]]:
    name = op_name(node)
    if name == "einsum":
        return combinations(_einsum_axes(node, tokens), 2)
    first = len(node.args) - 2 if name in _PRODUCTS else 0
    left, right = (axes_of(operand(node, index), tokens.axes) for index in (first, first + 1))
    if _SOFTMAX_ATTENTION in name:
        return [(left[-2], right[-2])]
    if name in _CONVOLUTIONS:
        return [(left[1], right[0]), *product(left[2:], (left[1], right[0], *right[2:]))]
    if name == "linear":
        return [(left[-1], right[0]), *product(left[:-1], (left[-1], right[0]))]
    return [] if min(len(left), len(right)) < 2 else [(left[-2], left[-1]), (left[-2], right[-1]), (right[-2], right[-1])]


def _einsum_axes(node: fx.Node, tokens: TokenMap) -> list[Axis]:
    """Return the axis of every letter but those of the batch, which all operands and the result have."""
    axes = [axes_of(each, tokens.axes) for each in operands(node, 1)]
    terms, result = dimension_names(str(node.args[0]), list(map(len, axes)))
    named = dict(pair for term, own in zip(terms, axes, strict=True) for pair in zip(term, own, strict=True))
    batch = set(result).intersection(*terms)
    return [axis for name, axis in named.items() if name not in batch]


def _image_tokens(axis: Axis, tokens: TokenMap) -> int:
    """Count the image tokens that an axis holds; a channel axis has none, whatever it was computed from."""
    return axis_size(tuple(segment for segment in axis if tokens.kind(segment) is TokenKind.IMAGE))
