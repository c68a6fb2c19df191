"""The passes over the whole model's graph: plain functions, in the order of `ANALYSIS`.

canonicalize_model    attention written by hand becomes one node
find_sites            every attention and feed-forward network, and the module that holds it and its projections
classify_model        which positions are image, text or other, and the image's grids
decide_sites          what may be done with every site, and why others are kept
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from edit_compile.config import LinearizeConfig
from edit_compile.passes.canonicalize import canonicalize
from edit_compile.passes.capture import Capture
from edit_compile.passes.classify_tokens import TokenMap, classify_tokens
from edit_compile.passes.find_attention import Attention, find_attention
from edit_compile.passes.find_feed_forward import FeedForward, find_feed_forward
from edit_compile.passes.plan_sites import Candidate, plan_sites
from edit_compile.passes.token_cuts import canonicalize_cuts


@dataclass
class Analysis:
    """What is known of a captured model; every pass adds its part."""

    captured: Capture
    config: LinearizeConfig
    attentions: list[Attention] = field(default_factory=list)
    feed_forwards: list[FeedForward] = field(default_factory=list)
    tokens: TokenMap | None = None
    sites: list[Candidate] = field(default_factory=list)

    @property
    def classified(self) -> TokenMap:
        assert self.tokens is not None, "classify_model has not run"
        return self.tokens


AnalysisPass = Callable[[Analysis], int]  # returns how many it has found


def canonicalize_model(analysis: Analysis) -> int:
    """Rewrite attention written by hand to one node each, and cuts along axes of any size as slices."""
    canonicalize_cuts(analysis.captured.graph, lambda size: isinstance(size, torch.SymInt))
    return canonicalize(analysis.captured.graph)


def find_sites(analysis: Analysis) -> int:
    """Find every attention and every feed-forward network."""
    analysis.attentions = find_attention(analysis.captured.graph)
    analysis.feed_forwards = find_feed_forward(analysis.captured.graph)
    return len(analysis.attentions) + len(analysis.feed_forwards)


def classify_model(analysis: Analysis) -> int:
    """Follow every axis from the model's inputs; counts the inputs that carry the image."""
    analysis.tokens = classify_tokens(analysis.captured)
    return len(analysis.tokens.image_inputs)


def decide_sites(analysis: Analysis) -> int:
    """Decide for every site which designs may be tried, or why it is kept."""
    captured, graph = analysis.captured, analysis.captured.graph
    weights = {node for node in graph.nodes if node.op == "placeholder" and captured.source(node).kind == "parameter"}
    analysis.sites = plan_sites(graph, analysis.attentions, analysis.feed_forwards, analysis.classified, analysis.config, weights)
    return len(analysis.sites)


ANALYSIS: tuple[AnalysisPass, ...] = (canonicalize_model, find_sites, classify_model, decide_sites)
