"""The verbs: plan a conversion, do it, run the teacher, compile."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from edit_compile.adapters.inputs import example_inputs as inputs_of
from edit_compile.capture import Capture, call_arguments, capture
from edit_compile.config import LinearizeConfig
from edit_compile.designs import build
from edit_compile.errors import CaptureError, ConfigError, PlanError, RewriteError
from edit_compile.grid import Runtime, publish_with, runtime_of
from edit_compile.passes.canonicalize import canonicalize
from edit_compile.passes.classify_tokens import Tokens, classify_tokens, position_ids
from edit_compile.passes.find_attention import find_attention
from edit_compile.passes.generate import generate_forward
from edit_compile.passes.plan_sites import plan_sites
from edit_compile.passes.rewrite import rewrite_site
from edit_compile.plans import Given, Plan, PositionIds, SitePlan, SizesOfInputs
from edit_compile.sites import SiteForward, converted_sites, install, shared_copy
from edit_compile.specs import describe, meta_from
from edit_compile.structure import structure_key
from edit_compile.tokens import TokenKind

Model = TypeVar("Model")


@dataclass
class _Rewriter:
    """Rewrites sites, each distinct structure once."""

    model: nn.Module
    inputs: Mapping[str, Any]
    config: LinearizeConfig
    done: dict[Any, SiteForward | RewriteError] = field(default_factory=dict)
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)

    def record(self, paths: set[str]) -> None:
        self.arguments = call_arguments(self.model, self.inputs, paths) if paths else {}

    def forward_for(self, site: SitePlan) -> SiteForward | RewriteError:
        module, arguments = self.model.get_submodule(site.path), self.arguments[site.path]
        key = (structure_key(module), str(describe(arguments)), site.action, site.query_layout, site.query_sizes)
        if key not in self.done:
            try:
                captured = capture(module, arguments, functional=True, cast=False)
                rewritten = rewrite_site(captured, module, site, self.config)
                with torch.device("meta"):
                    build(rewritten.additions, self.config)  # do the options fit this site's channels?
                self.done[key] = SiteForward(generate_forward(rewritten.graph, captured, module, arguments), rewritten.additions)
            except (RewriteError, CaptureError, PlanError, ConfigError) as error:
                self.done[key] = RewriteError(str(error))
        return self.done[key]


def plan(model: Any, config: LinearizeConfig | None = None, example_inputs: Mapping[str, Any] | None = None) -> Plan:
    """What `linearize` would do to a model, site by site, and why. The model is read, never run; meta weights are fine.

    Args:
        model: a transformer, or a diffusers pipeline that has one.
        config: see `LinearizeConfig`.
        example_inputs: keyword arguments of one forward, all sizes different; not needed for models with an adapter
            (PixArt, SD3, FLUX, DiT, timm ViTs). `edit_compile.record(pipe, ...)` makes them for any pipeline.

    Raises:
        CaptureError: the model cannot be captured.
        PlanError: it has no attention; says what was looked at.
        NoExampleInputsError: no adapter knows the model, and no inputs were given.
    """
    return _plan(transformer_of(model), config or LinearizeConfig(), example_inputs)[0]


def _plan(model: nn.Module, config: LinearizeConfig, example_inputs: Mapping[str, Any] | None) -> tuple[Plan, _Rewriter]:
    if converted_sites(model):
        raise PlanError(f"{type(model).__name__} is converted already")
    inputs = dict(example_inputs) if example_inputs is not None else inputs_of(model)
    captured = capture(model, inputs)
    canonicalize(captured.graph)
    tokens = classify_tokens(captured)
    sites = plan_sites(captured.graph, find_attention(captured.graph), tokens, config)
    if not sites:
        kinds = sorted({type(m).__name__ for m in model.modules()})
        raise PlanError(
            f"{type(model).__name__} has no attention: none of its {len(captured.graph.nodes)} operations is one ({', '.join(kinds[:8])})"
        )
    rewriter = _Rewriter(model, inputs, config)
    rewriter.record({site.path for site in sites if site.rewritten})
    sites = [_tried(site, rewriter) for site in sites]
    made = Plan(
        model=type(model).__name__,
        config=config,
        sites=tuple(sites),
        grid=_grid_source(captured, tokens, sites, set(inputs)),
        inputs=describe(inputs),
    )
    return made, rewriter


def _tried(site: SitePlan, rewriter: _Rewriter) -> SitePlan:
    if not site.rewritten:
        return site
    result = rewriter.forward_for(site)
    return site.model_copy(update={"action": "keep", "reason": str(result)}) if isinstance(result, RewriteError) else site


def _require_some(model: nn.Module, sites: Sequence[SitePlan]) -> None:
    if any(site.rewritten for site in sites):
        return
    nearest = next((s for s in sites if s.query_layout.has(TokenKind.IMAGE) and s.key_layout.has(TokenKind.IMAGE)), sites[0])
    raise PlanError(
        f"{type(model).__name__}: none of {len(sites)} attention sites can be converted; "
        f"the nearest is {nearest.path}, {nearest.query_layout}: {nearest.reason}"
    )


def _grid_source(captured: Capture, tokens: Tokens, sites: list[SitePlan], arguments: set[str]) -> SizesOfInputs | PositionIds | Given:
    site = next((site for site in sites if site.rewritten), None)
    if site is None:
        return Given()
    if site.grid is not None:
        needed = {name for expression in site.grid.sizes for name in re.findall(r"[A-Za-z_]\w*", expression)}
        symbols = {name: where for name, where in _symbols(captured).items() if name in needed and where[0] in arguments}
        return SizesOfInputs(expressions=site.grid.sizes, symbols=symbols) if set(symbols) == needed else Given()
    length = site.query_sizes[next(i for i, s in enumerate(site.query_layout.segments) if s.kind is TokenKind.IMAGE)]
    ids = position_ids(captured, tokens, length)
    return PositionIds(input=ids) if ids is not None and ids in arguments else Given()


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


def linearize(
    model: Model, config: LinearizeConfig | None = None, example_inputs: Mapping[str, Any] | None = None, plan: Plan | None = None
) -> Model:
    """A copy of the model with its attention between image tokens made linear. The picture is wrong until distilled.

    The copy is of the model's class; weights outside the converted sites are shared with the original, which stays as
    it was. Given a diffusers pipeline, returns a pipeline with its transformer converted.

    Args:
        model, config, example_inputs: as for `plan`.
        plan: a plan made before; excludes config and example_inputs.

    Raises:
        PlanError: no site can be converted (shows the nearest miss), or the plan does not fit the model; otherwise as `plan`.
        RewriteError: a planned site cannot be rewritten.
    """
    if plan is not None and (config is not None or example_inputs is not None):
        raise PlanError("give either a plan or config and example_inputs: a plan holds both")
    if not isinstance(model, nn.Module):
        return _linearized_pipeline(model, config, example_inputs, plan)
    if plan is None:
        plan, rewriter = _plan(model, config or LinearizeConfig(), example_inputs)
    else:
        _check_fits(model, plan)
        rewriter = _Rewriter(model, meta_from(plan.inputs), plan.config)
        rewriter.record({site.path for site in plan.rewritten})
    return _converted(model, plan, rewriter)  # type: ignore[return-value]


def _converted(model: nn.Module, plan: Plan, rewriter: _Rewriter) -> nn.Module:
    _require_some(model, plan.sites)
    student = shared_copy(model)
    runtime = Runtime(plan.grid)
    classes: dict[Any, type] = {}
    for site in plan.rewritten:
        forward = rewriter.forward_for(site)
        if isinstance(forward, RewriteError):
            raise forward
        install(student, site.path, forward, plan.config, runtime, classes)
    publish_with(student, runtime)
    student.__dict__["edit_plan"] = plan
    return student


def _linearized_pipeline(pipeline: Any, *options: Any) -> Any:
    converted = linearize(transformer_of(pipeline), *options)
    components = {**pipeline.components, "transformer": converted}
    return type(pipeline)(**{name: components[name] for name in pipeline._get_signature_keys(pipeline)[0] if name in components})


def transformer_of(model: Any) -> nn.Module:
    """The model itself, or a pipeline's transformer.

    Raises:
        PlanError: neither.
    """
    found = model if isinstance(model, nn.Module) else getattr(model, "transformer", None)
    if not isinstance(found, nn.Module):
        raise PlanError(f"{type(model).__name__} is neither a torch.nn.Module nor a pipeline with a transformer")
    return found


def _check_fits(model: nn.Module, plan: Plan) -> None:
    if plan.model != type(model).__name__:
        raise PlanError(f"the plan is for a {plan.model}, this is a {type(model).__name__}")
    paths = {path for path, _ in model.named_modules()}
    missing = [site.path for site in plan.rewritten if site.path not in paths]
    if missing:
        raise PlanError(f"the plan's sites {missing[:3]} are not in this {plan.model}")


def plan_of(student: nn.Module) -> Plan:
    """The plan a converted model was made by."""
    runtime_of(student)
    return student.__dict__["edit_plan"]


@contextmanager
def teacher(student: nn.Module) -> Iterator[nn.Module]:
    """Inside, the converted model runs its original attention, with its original weights."""
    runtime = runtime_of(student)
    before, runtime.teaching = runtime.teaching, True
    try:
        yield student
    finally:
        runtime.teaching = before


def compile(student: nn.Module, **options: Any) -> nn.Module:
    """Regional torch.compile, in place: the repeated blocks that hold the sites, dynamic in resolution.

    Args:
        options: of torch.compile; `dynamic=True` and `fullgraph=True` unless given.
    """
    runtime_of(student)
    for path in repeated_blocks(student):
        student.get_submodule(path).compile(**{"dynamic": True, "fullgraph": True, **options})
    return student


def repeated_blocks(student: nn.Module) -> list[str]:
    """The modules in the model's lists of blocks that hold its attention."""
    blocks: dict[str, None] = {}
    for path in (site.path for site in plan_of(student).sites):
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        blocks[".".join(parts[: at + 1])] = None
    return list(blocks)
