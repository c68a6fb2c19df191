"""What designs without a special answer to it refuse: masks by query, causal attention, grids that are not (h, w)."""

from __future__ import annotations

from edit_compile.ir.site import Site


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
