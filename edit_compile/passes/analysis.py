"""The passes: plain functions over one graph, run in the order of `PASSES`. Each run leaves a record of what it did.

    canonicalize      attention written by hand becomes one node
    find_attention    every attention, and the module that holds it and its projections
    classify_tokens   which positions are image, text or other, and the image's grid
    plan_sites        what is done with every attention, and why

`rewrite` then works site by site, on each site's own graph, and `audit` looks at the converted model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from edit_compile.config import LinearizeConfig
from edit_compile.ir.plan import SitePlan
from edit_compile.passes.canonicalize import canonicalize
from edit_compile.passes.capture import Capture
from edit_compile.passes.classify_tokens import Tokens, classify_tokens
from edit_compile.passes.find_attention import Attention, find_attention
from edit_compile.passes.plan_sites import plan_sites

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassRecord:
    """What a pass did: `found` counts what it is named for, `nodes` the graph's nodes after it."""

    name: str
    found: int
    nodes: int
    milliseconds: float


@dataclass
class Analysis:
    """What is known of a captured model; every pass adds its part."""

    captured: Capture
    config: LinearizeConfig
    attentions: list[Attention] = field(default_factory=list)
    tokens: Tokens | None = None
    sites: list[SitePlan] = field(default_factory=list)
    records: list[PassRecord] = field(default_factory=list)

    @property
    def classified(self) -> Tokens:
        assert self.tokens is not None, "classify_tokens has not run"
        return self.tokens


def _canonicalize(analysis: Analysis) -> int:
    return canonicalize(analysis.captured.graph)


def _find_attention(analysis: Analysis) -> int:
    analysis.attentions = find_attention(analysis.captured.graph)
    return len(analysis.attentions)


def _classify_tokens(analysis: Analysis) -> int:
    analysis.tokens = classify_tokens(analysis.captured)
    return len(analysis.tokens.pictures)


def _plan_sites(analysis: Analysis) -> int:
    graph = analysis.captured.graph
    analysis.sites = plan_sites(graph, analysis.attentions, analysis.classified, analysis.config)
    return len(analysis.sites)


PASSES: tuple[tuple[str, Callable[[Analysis], int]], ...] = (
    ("canonicalize", _canonicalize),
    ("find_attention", _find_attention),
    ("classify_tokens", _classify_tokens),
    ("plan_sites", _plan_sites),
)


def analyse(captured: Capture, config: LinearizeConfig) -> Analysis:
    """Run `PASSES` over a captured model. The records are also logged, at level DEBUG."""
    analysis = Analysis(captured, config)
    for name, run in PASSES:
        start = time.perf_counter()
        found = run(analysis)
        record = PassRecord(name, found, len(captured.graph.nodes), 1000 * (time.perf_counter() - start))
        analysis.records.append(record)
        log.debug("%s: %d found, %d nodes, %.0f ms", record.name, record.found, record.nodes, record.milliseconds)
    return analysis
