"""What several designs read from a site: why they refuse it, who attends to whom, and the products that follow from that."""

from __future__ import annotations

from edit_compile.designs.base import Verdict
from edit_compile.designs.ops.parts import Part, Product, Softmax
from edit_compile.ir.site import Site
from edit_compile.ir.tokens import TokenKind

GRID_DIMS = (2, 3)  # images and videos


def first_problem(site: Site, grid_dims: tuple[int, ...] = (2,)) -> str | None:
    """Say what stands in the way of an attention design on grids of these dimensions, in words; None if nothing does.

    An unknown grid is taken for one of them: the caller states it.
    """
    if site.kind != "attention":
        return "it is for attention"
    if site.mask == "by_query":
        return "the mask differs from query to query"
    if site.mask == "bias":
        return "a learned bias, which differs from query to query, is added to its scores"
    if site.causal:
        return "causal attention"
    if site.grid_dims is not None and site.grid_dims not in grid_dims:
        return (
            f"video: the grid has time, {site.grid_dims} dimensions" if site.grid_dims == 3 else f"the grid has {site.grid_dims} dimensions"
        )
    return None


def has_other_queries(site: Site) -> bool:
    """Say whether other tokens than the image's have queries."""
    return not site.queries.only(TokenKind.IMAGE)


def who_attends(site: Site) -> str:
    """Say in words which tokens attend to which."""
    if site.keys.only(TokenKind.IMAGE) and not has_other_queries(site):
        return "attention between image tokens"
    return "image tokens and others attend jointly" if has_other_queries(site) else "image tokens attend to image tokens and others"


def any_attention(site: Site) -> Verdict:
    """Take attention of images and of videos, whatever else takes part."""
    problem = first_problem(site, GRID_DIMS)
    return Verdict(problem is None, problem or who_attends(site))


def joint_attention(site: Site) -> Verdict:
    """Take attention of images and of videos in which other tokens are among the keys."""
    problem = first_problem(site, GRID_DIMS)
    if problem is None and site.keys.only(TokenKind.IMAGE):
        problem = "it is for joint attention of image tokens and others"
    return Verdict(problem is None, problem or who_attends(site))


def sequence_lengths(site: Site, image_queries: int, image_keys: int, others: int) -> tuple[int, int]:
    """Count all queries and all keys of a site, given those of the image and the number of other tokens."""
    queries = image_queries + (others if has_other_queries(site) else 0)
    return queries, image_keys + (0 if site.keys.only(TokenKind.IMAGE) else others)


def linear_attention_parts(site: Site, queries: int, keys: int) -> tuple[Part, ...]:
    """List the products of `linear_attention`: the summary of the keys, and its product with each query."""
    d, e = site.head_dim, site.value_dim
    return Product(d, e, keys, site.heads), Product(queries, e, d, site.heads)


def softmax_attention(site: Site, queries: int, keys: int, blocks: int = 1) -> Softmax:
    """Return softmax attention of all heads, of that many queries to that many keys, in each of several blocks."""
    return Softmax(queries, keys, site.head_dim, site.value_dim, site.heads * blocks)
