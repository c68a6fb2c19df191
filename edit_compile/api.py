"""The verbs: plan a conversion, do it, audit it, run the teacher, compile."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from torch import nn

from edit_compile.adapters.inputs import example_inputs as inputs_of
from edit_compile.capture import capture
from edit_compile.config import LinearizeConfig
from edit_compile.conversion import SiteRewriter, converted
from edit_compile.errors import AuditError, EditCompileError, PlanError
from edit_compile.grid import grid, runtime_of
from edit_compile.passes.audit import Audit
from edit_compile.passes.audit import audit as audit_graph
from edit_compile.planning import make_plan
from edit_compile.plans import Plan, SizesOfInputs
from edit_compile.sites import converted_sites
from edit_compile.specs import meta_from
from edit_compile.tokens import TokenKind

Model = TypeVar("Model")
TRAINED = "edit_trained"  # names of what was trained outside the converted sites


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
    return _planned(transformer_of(model), config, example_inputs)[0]


def _planned(model: nn.Module, config: LinearizeConfig | None, example_inputs: Mapping[str, Any] | None) -> tuple[Plan, SiteRewriter]:
    if converted_sites(model):
        raise PlanError(f"{type(model).__name__} is converted already")
    inputs = dict(example_inputs) if example_inputs is not None else inputs_of(model)
    return make_plan(model, config or LinearizeConfig(), inputs)


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
        AuditError: as `audit`.
    """
    if plan is not None and (config is not None or example_inputs is not None):
        raise PlanError("give either a plan or config and example_inputs: a plan holds both")
    if not isinstance(model, nn.Module):
        return _linearized_pipeline(model, config, example_inputs, plan)
    if plan is not None:
        _check_fits(model, plan)
        rewriter = SiteRewriter(model, meta_from(plan.inputs), plan.config)
        rewriter.prepare(plan.rewritten)
        return converted(model, plan, rewriter)  # type: ignore[return-value]
    student = converted(model, *_planned(model, config, example_inputs))
    audit(student)
    return student  # type: ignore[return-value]


def audit(student: nn.Module) -> Audit:
    """Capture a converted model again and check that its rewritten sites are what its plan says. `linearize` does so for
    a plan that it makes itself.

    Raises:
        AuditError: attention between image tokens, or another cost that grows with their square, is left at a rewritten site.
    """
    plan = plan_of(student)
    with grid(student, *_any_grid(plan)) if not isinstance(plan.grid, SizesOfInputs) else nullcontext():
        captured = capture(student, meta_from(plan.inputs))
    found = audit_graph(captured, [site.path for site in plan.rewritten])
    if found.findings:
        more = f" (and {len(found.findings) - 1} more)" if len(found.findings) > 1 else ""
        raise AuditError(f"{plan.model} is not what its plan says: {found.findings[0]}{more}; please report this with the model's config")
    return found


def _any_grid(plan: Plan) -> tuple[int, int]:
    """A grid for the example's number of image tokens, as square as it can be."""
    site = plan.rewritten[0]
    tokens = site.query_sizes[[s.kind for s in site.query_layout.segments].index(TokenKind.IMAGE)]
    height = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0)
    return height, tokens // height


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
    """Inside, the converted model runs its original attention, with its original weights.

    Raises:
        EditCompileError: its other weights were trained as well, so that it is no longer the teacher.
    """
    runtime = runtime_of(student)
    if student.__dict__.get(TRAINED):
        raise EditCompileError(f"all weights of this {type(student).__name__} were trained: its teacher is the base model, load that")
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
