"""What is known of one site while its passes run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from edit_compile.config import Choice
from edit_compile.designs.base import Design, Tap
from edit_compile.errors import RewriteError
from edit_compile.ir.plan import Refusal, SitePlan
from edit_compile.ir.site import Place, Site
from edit_compile.ir.tokens import TokenKind
from edit_compile.passes.axes.algebra import Axis, Value
from edit_compile.passes.capture import Capture
from edit_compile.passes.find_attention import Attention
from edit_compile.passes.find_feed_forward import FeedForward
from edit_compile.passes.graph_walk import source_line

IMAGE_SOURCE = "image"  # the source that image tokens are said to come from in a site's own graph
ADDED = "edit"  # the attribute of a site that its design's module becomes


class Refused(RewriteError):
    """Ends the passes over a site: it cannot be rewritten."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.refusal = refusal(reason, node)


class Declined(Refused):
    """Ends the passes over a site: the design does not take it, by the facts alone."""


def refusal(reason: str, node: fx.Node | None = None) -> Refusal:
    """Say why a site cannot be rewritten, and at which node and line."""
    return Refusal(reason=reason, node=node.name if node is not None else None, source=source_line(node) if node is not None else None)


@dataclass
class SiteGraph:
    """One site's own graph and what the passes have found in it.

    Attributes:
        module: the site's module.
        arguments: that it was captured with, by parameter name.
        captured: the module on its own, with symbolic sizes.
        plan: what the whole model's graph tells of the site.
        choice: the design to try.
        graph: as it is now; `grid` its placeholder for the grid, once taps are inserted.
        axes: what its tensors' dimensions are made of.
        core: the attention or the feed-forward network.
        site: the facts for the design.
        verdict: why the design takes the site, in its words.
        design: its module, on the meta device; `taps` are those that it gave.
        operands: what `core`'s operands have become behind the taps, by name.
        forward: the generated method.
    """

    module: nn.Module
    arguments: Mapping[str, Any]
    captured: Capture
    plan: SitePlan
    choice: Choice
    graph: fx.Graph
    axes: Mapping[fx.Node, Value] = field(default_factory=dict)
    grid: fx.Node | None = None
    core: Attention | FeedForward | None = None
    places: dict[Place, fx.Node | Refusal] = field(default_factory=dict)
    site: Site | None = None
    verdict: str = ""
    design: Design | None = None
    taps: tuple[Tap, ...] = ()
    operands: dict[str, fx.Node] = field(default_factory=dict)
    forward: Callable[..., Any] | None = None

    @property
    def facts(self) -> Site:
        assert self.site is not None, "locate_core has not run"
        return self.site

    @property
    def chosen(self) -> Design:
        assert self.design is not None, "build_design has not run"
        return self.design


SitePass = Callable[[SiteGraph], int]  # returns a count of what it is named for


def example_grid(plan: SitePlan) -> tuple[int, ...]:
    """Return a site's grid in the example; where it is unknown, one of as many tokens, as square as it can be."""
    if plan.grid_sizes:
        return plan.grid_sizes
    tokens = plan.query_sizes[[s.kind for s in plan.query_layout.segments].index(TokenKind.IMAGE)]
    height = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0)
    return height, tokens // height


def is_image(axis: Axis) -> bool:
    """Say whether an axis of a site's graph holds image tokens."""
    return any(IMAGE_SOURCE in segment.all_sources for segment in axis)


def image_place(axis: Axis) -> tuple[int | None, int | None]:
    """Count the tokens before and after the image in an axis; None where it varies from call to call."""
    at = next(i for i, segment in enumerate(axis) if IMAGE_SOURCE in segment.all_sources)
    return known_length(axis[:at]), known_length(axis[at + 1 :])


def known_length(segments: Axis) -> int | None:
    """Sum up the segments' sizes; None unless all are constants."""
    return sum(s.size for s in segments) if all(s.expr.isdigit() for s in segments) else None
