"""From a model to its compiled plan: capture, the passes over the model, the passes over each site, the grid's source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edit_compile.config import Choice, LinearizeConfig, parse_options
from edit_compile.designs import find_design
from edit_compile.errors import ConfigError, GridError, PlanError, RewriteError
from edit_compile.ir import input_spec
from edit_compile.ir.plan import Plan, SitePlan, SizesOfInputs
from edit_compile.ir.size_expressions import evaluator
from edit_compile.passes.analysis import Analysis
from edit_compile.passes.capture import Capture
from edit_compile.passes.find_grid import GridFinder, on_grid_of
from edit_compile.passes.pipeline import Passes, run_passes
from edit_compile.passes.plan_sites import Candidate
from edit_compile.passes.relate_sizes import capture_model
from edit_compile.passes.site_compiler import SiteCompiler, SiteForward, compile_sites
from edit_compile.progress import working


@dataclass(frozen=True)
class CompiledPlan:
    """A plan, and the new forward of every site that it rewrites, by path. Each distinct one has passed the audit."""

    plan: Plan
    forwards: Mapping[str, SiteForward]


def compile_plan(model: nn.Module, inputs: Mapping[str, Any], config: LinearizeConfig, passes: Passes | None = None) -> CompiledPlan:
    """Plan a model's conversion, and compile it: a site that no design can be compiled for is kept, and the reason is in the plan.

    Args:
        inputs: keyword arguments of one forward, batch 2 or more, all sizes different.

    Raises:
        CaptureError: the model cannot be captured.
        PlanError: it has no attention, says what was looked at; or the inputs have batch 1.
        AuditError: a design is not what it says.
    """
    passes = _checked(passes)
    with working(f"capturing {type(model).__name__}"):
        captured, inputs = capture_model(model, inputs)
    analysis = Analysis(captured, config)
    records = run_passes(passes.analysis, analysis, "model", lambda at: at.captured.graph)
    _require_batch(analysis.captured)
    if not analysis.sites:
        raise PlanError(_nothing_found(model, analysis.captured))
    finder = GridFinder(analysis.captured, analysis.classified, inputs)
    compiler = SiteCompiler(model, inputs, passes, (analysis.captured.probe,))
    sites, forwards = compile_sites(compiler, [finder.with_known_grid(candidate) for candidate in analysis.sites])
    source = finder.source(sites)
    sites = tuple(on_grid_of(site, source, sites) for site in sites)
    forwards = {site.path: forwards[site.path] for site in sites if site.rewritten}
    plan = Plan(
        model=type(model).__name__,
        sites=sites,
        grid=source,
        inputs=input_spec.encode(dict(inputs)),
        passes=(*records, *compiler.records),
    )
    return CompiledPlan(plan, forwards)


def recompile(model: nn.Module, plan: Plan, passes: Passes | None = None) -> CompiledPlan:
    """Compile a plan that was made before, as it is.

    Raises:
        PlanError: it does not fit the model, or was made with a pass that is not among those given.
        RewriteError: a planned site cannot be rewritten.
        AuditError: a design is not what it says.
        ConfigError: a design or one of its options is not known.
    """
    passes = _checked(passes)
    _check_fits(model, plan, passes)
    compiler = SiteCompiler(model, input_spec.decode(plan.inputs), passes)
    sites, forwards = compile_sites(compiler, [Candidate(site, (_choice(site),)) for site in plan.rewritten])
    for planned, found in zip(plan.rewritten, sites, strict=True):
        if not found.rewritten:
            raise RewriteError(f"{planned.path}: {found.reason}")
        _check_grid(planned, plan)
    return CompiledPlan(plan, forwards)


def _checked(passes: Passes | None) -> Passes:
    """Return the passes, the shipped ones for None; raise `ConfigError` for anything else."""
    if passes is not None and not isinstance(passes, Passes):
        raise ConfigError(f"passes is a Passes, like Passes().insert(mine, before=...), not a {type(passes).__name__}")
    return passes or Passes()


def _choice(site: SitePlan) -> Choice:
    design = find_design(site.action)
    return Choice("*", design, parse_options(design, site.options))


def _check_fits(model: nn.Module, plan: Plan, passes: Passes) -> None:
    if plan.model != type(model).__name__:
        raise PlanError(f"the plan is for a {plan.model}, this is a {type(model).__name__}")
    plan.check()
    paths = {path for path, _ in model.named_modules()}
    missing = [site.path for site in plan.rewritten if site.path not in paths]
    if missing:
        raise PlanError(f"the plan's sites {missing[:3]} are not in this {plan.model}")
    for site in plan.rewritten:
        if len(site.query_sizes) != len(site.query_layout.segments) or len(site.key_sizes) != len(site.key_layout.segments):
            raise PlanError(f"the plan's site {site.path} does not say how long each segment of its tokens is")
    made_with = dict.fromkeys(record.name for record in plan.passes if record.graph != "model")
    known = {run.__name__ for run in passes.site}
    unknown = [name for name in made_with if name not in known]
    if unknown:
        raise PlanError(f"the plan was made with the pass {unknown[0]!r}, which is not among those given; give it with passes=")


def _check_grid(site: SitePlan, plan: Plan) -> None:
    """Raise `PlanError` for a grid that is not made of the sizes that the plan reads."""
    if not isinstance(plan.grid, SizesOfInputs):
        return
    sizes = (plan.grid.expressions, *([site.grid.sizes] if site.grid is not None else []))
    if len(sizes) == 1 and plan.grid.images is None:
        raise PlanError(f"the plan does not say what the grid of {site.path} is")
    try:
        for expression in (each for grid in sizes for each in grid):
            evaluator(expression, set(plan.grid.symbols))
    except GridError as error:
        raise PlanError(f"the plan's grid of {site.path}: {error}") from None


def _nothing_found(model: nn.Module, captured: Capture) -> str:
    kinds = sorted({type(m).__name__ for m in model.modules()})
    looked_at = f"none of its {len(captured.graph.nodes)} operations is one"
    return f"{type(model).__name__} has no attention: {looked_at} ({', '.join(kinds[:8])})"


def _require_batch(captured: Capture) -> None:
    """Raise `PlanError` for batch 1: a constant in a graph, and what is made from it would mix the samples of a larger batch, or fail."""
    outputs = [leaf.meta.get("val") for leaf in captured.graph.output_node().all_input_nodes]
    if any(isinstance(value, torch.Tensor) and value.ndim > 1 and type(value.shape[0]) is int and value.shape[0] == 1 for value in outputs):
        raise PlanError(
            "the example inputs have batch 1, which a graph takes for a constant: give them batch 2 or more "
            "(edit_compile.record(pipe, ...) does)"
        )
