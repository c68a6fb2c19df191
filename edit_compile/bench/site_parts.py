"""What the designs of a converted model do in one forward, site by site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from torch import nn

from edit_compile.designs.base import Design, Tokens
from edit_compile.designs.ops.parts import Part
from edit_compile.passes.site_graph import ADDED
from edit_compile.student.site import converted_sites


def designs_of(student: nn.Module) -> dict[str, Design]:
    """List the designs' modules of a converted model, by the paths of their sites."""
    return {path: cast("Design", getattr(site, ADDED)) for path, site in converted_sites(student).items()}


@contextmanager
def layouts_noted(student: nn.Module) -> Iterator[dict[str, Tokens]]:
    """Note, in a forward inside, which tokens meet at each rewritten site of attention. Yields what is noted, by path."""
    found: dict[str, Tokens] = {}

    def note(path: str, module: nn.Module, operands: Any) -> None:
        found[path] = operands[1]

    hooks = [design.register_forward_pre_hook(partial(note, path)) for path, design in designs_of(student).items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def parts_by_site(student: nn.Module, layouts: Mapping[str, Tokens], grid: tuple[int, ...], others: int) -> dict[str, tuple[Part, ...]]:
    """List the parts of each rewritten site, of one sample, but for those that do nothing, as to no other tokens.

    Args:
        layouts: as noted; a feed-forward network has none.
        grid, others: of the image tokens, and the number of other tokens, where there is no layout.
    """
    found = {}
    for path, design in designs_of(student).items():
        assert design.built_for is not None
        site, options = design.built_for
        tokens = layouts.get(path)
        sizes, number = (grid, others) if tokens is None or not tokens.grid else (tokens.grid, _others(tokens))
        found[path] = tuple(part for part in design.parts(site, sizes, number, options) if part.flops)
    return found


def _others(tokens: Tokens) -> int:
    """Count the tokens that are not the image's, of the keys or the queries, whichever has more."""
    return max(sum(span.length for span in each.spans() if span.kind != "image") for each in (tokens, tokens.of_keys))
