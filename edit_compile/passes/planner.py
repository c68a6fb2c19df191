"""From a model to its plan: capture, the passes, a trial of every rewrite, and where the image's grid comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from edit_compile.config import LinearizeConfig
from edit_compile.errors import PlanError, RewriteError
from edit_compile.ir.input_spec import describe
from edit_compile.ir.plan import Given, Plan, PositionIds, SitePlan, SizesOfInputs
from edit_compile.ir.tokens import TokenKind
from edit_compile.passes.analysis import Analysis, analyse
from edit_compile.passes.capture import Capture, capture
from edit_compile.passes.classify_tokens import position_ids
from edit_compile.student.convert import SiteRewriter


def make_plan(model: nn.Module, config: LinearizeConfig, inputs: Mapping[str, Any]) -> tuple[Plan, SiteRewriter]:
    """The plan, and the rewriter that has tried it: a site whose rewrite fails is kept, and the failure is the reason.

    Raises:
        PlanError: the model has no attention; says what was looked at. Or the example inputs have batch 1.
    """
    analysis = analyse(capture(model, inputs), config)
    _require_batch(analysis.captured)
    if not analysis.sites:
        kinds = sorted({type(m).__name__ for m in model.modules()})
        looked_at = f"none of its {len(analysis.captured.graph.nodes)} operations is one"
        raise PlanError(f"{type(model).__name__} has no attention: {looked_at} ({', '.join(kinds[:8])})")
    rewriter = SiteRewriter(model, inputs, config)
    rewriter.prepare(site for site in analysis.sites if site.rewritten)
    sites = tuple(_tried(site, rewriter) for site in analysis.sites)
    grid = _grid_source(analysis, sites, set(inputs))
    return Plan(model=type(model).__name__, config=config, sites=sites, grid=grid, inputs=describe(inputs)), rewriter


def _require_batch(captured: Capture) -> None:
    """A size of 1 is a constant in a graph: what is made from it would mix the samples of a larger batch, or fail."""
    outputs = [leaf.meta.get("val") for leaf in captured.graph.output_node().all_input_nodes]
    if any(isinstance(value, torch.Tensor) and value.ndim > 1 and type(value.shape[0]) is int and value.shape[0] == 1 for value in outputs):
        raise PlanError(
            "the example inputs have batch 1, which a graph takes for a constant: give them batch 2 or more "
            "(edit_compile.record(pipe, ...) does)"
        )


def _tried(site: SitePlan, rewriter: SiteRewriter) -> SitePlan:
    if not site.rewritten:
        return site
    result = rewriter.forward_for(site)
    return site.model_copy(update={"action": "keep", "reason": str(result)}) if isinstance(result, RewriteError) else site


def _grid_source(analysis: Analysis, sites: tuple[SitePlan, ...], arguments: set[str]) -> SizesOfInputs | PositionIds | Given:
    rewritten = [site for site in sites if site.rewritten]
    if not rewritten:
        return Given()
    site = next((site for site in rewritten if site.grid is not None), rewritten[0])
    if site.grid is not None:
        symbols = _symbols_of(site.grid.sizes, analysis.captured, arguments)
        return SizesOfInputs(expressions=site.grid.sizes, symbols=symbols) if symbols is not None else Given()
    at = next(i for i, s in enumerate(site.query_layout.segments) if s.kind is TokenKind.IMAGE)
    ids = position_ids(analysis.captured, analysis.classified, site.query_sizes[at])
    if ids is not None and ids in arguments:
        return PositionIds(input=ids)
    tokens = site.query_layout.segments[at].length
    symbols = _symbols_of((tokens,), analysis.captured, arguments)
    return Given(tokens=tokens, symbols=symbols) if symbols is not None else Given()


def _symbols_of(expressions: Sequence[str], captured: Capture, arguments: set[str]) -> dict[str, tuple[str, int]] | None:
    """Where the symbols of some expressions can be read; None if that is not known of all."""
    needed = {name for expression in expressions for name in re.findall(r"[A-Za-z_]\w*", expression)}
    symbols = {name: where for name, where in _symbols(captured).items() if name in needed and where[0] in arguments}
    return symbols if set(symbols) == needed else None


def _symbols(captured: Capture) -> dict[str, tuple[str, int]]:
    """Where the value of a size symbol can be read: an input and its dimension."""
    found: dict[str, tuple[str, int]] = {}
    for node in captured.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and captured.source(node).kind == "input" and isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt) and str(size.node.expr).isidentifier():
                    found.setdefault(str(size.node.expr), (captured.source(node).name, dim))
    return found
