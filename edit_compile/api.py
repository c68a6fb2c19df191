"""The verbs: plan a conversion, do it, audit it, run the teacher, compile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from torch import nn

from edit_compile.adapters.inputs import example_inputs as inputs_of
from edit_compile.adapters.pipelines import with_transformer
from edit_compile.config import LinearizeConfig
from edit_compile.errors import AuditError, ConfigError, PlanError
from edit_compile.ir import input_spec
from edit_compile.ir.plan import Plan, SizesOfInputs
from edit_compile.passes.audit import Audit, allowed_at, example_grid
from edit_compile.passes.audit import audit as audit_graph
from edit_compile.passes.capture import capture
from edit_compile.passes.planner import CompiledPlan, compile_plan, recompile
from edit_compile.student.checkpoint import attach_save_pretrained
from edit_compile.student.convert import PLAN, install, require_plain_forwards
from edit_compile.student.grid import converted_model, grid, runtime_of
from edit_compile.student.site import converted_sites
from edit_compile.student.weights import original_weights

Model = TypeVar("Model")
REGIONAL: dict[str, Any] = {"dynamic": True, "fullgraph": True}  # how blocks are compiled


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
    return _compiled(transformer_of(model), config, example_inputs).plan


def plan_and_convert(
    model: Any, config: LinearizeConfig | None = None, example_inputs: Mapping[str, Any] | None = None
) -> tuple[Plan, nn.Module | None]:
    """Do `plan` and `linearize` in one, without the audit of the whole model: the plan, and the converted copy, None where no site can be
    converted.
    """
    transformer = transformer_of(model)
    compiled = _compiled(transformer, config, example_inputs)
    return compiled.plan, install(transformer, compiled) if compiled.plan.rewritten else None


def _compiled(model: nn.Module, config: LinearizeConfig | None, example_inputs: Mapping[str, Any] | None) -> CompiledPlan:
    if converted_sites(model):
        raise PlanError(f"{type(model).__name__} is converted already")
    if config is not None and not isinstance(config, LinearizeConfig):
        raise ConfigError(f"config is a LinearizeConfig, not a {type(config).__name__}")
    if example_inputs is not None and not (isinstance(example_inputs, Mapping) and all(isinstance(name, str) for name in example_inputs)):
        raise PlanError(
            f"example_inputs are keyword arguments of the model's forward, a dict by name, not a {type(example_inputs).__name__}"
        )
    require_plain_forwards(model)
    inputs = dict(example_inputs) if example_inputs is not None else inputs_of(model)
    return compile_plan(model, inputs, config or LinearizeConfig())


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
        if not isinstance(plan, Plan):
            raise PlanError(f"plan is a Plan, as edit_compile.plan(model) makes it, not a {type(plan).__name__}")
        require_plain_forwards(model)
        return attach_save_pretrained(install(model, recompile(model, plan)))  # type: ignore[return-value]
    student = install(model, _compiled(model, config, example_inputs))
    audit(student)
    return attach_save_pretrained(student)  # type: ignore[return-value]


def audit(student: nn.Module) -> Audit:
    """Capture a converted model again and check that its rewritten sites are what its plan says. `linearize` does so for
    a plan that it makes itself.

    Raises:
        AuditError: attention between image tokens, or another cost that grows with their square, is left at a rewritten site.
    """
    plan = plan_of(student)
    with grid(student, *example_grid(plan.rewritten[0])) if not isinstance(plan.grid, SizesOfInputs) else nullcontext():
        captured = capture(student, input_spec.decode(plan.inputs), symbolic=False)
    found = audit_graph(captured, {site.path: allowed_at(site) for site in plan.rewritten if site.kind == "attention"})
    if found.findings:
        more = f" (and {len(found.findings) - 1} more)" if len(found.findings) > 1 else ""
        raise AuditError(f"{plan.model} is not what its plan says: {found.findings[0]}{more}; please report this with the model's config")
    return found


def _linearized_pipeline(pipeline: Any, *options: Any) -> Any:
    return with_transformer(pipeline, linearize(transformer_of(pipeline), *options))


def transformer_of(model: Any) -> nn.Module:
    """The model itself, or a pipeline's transformer.

    Raises:
        PlanError: neither.
    """
    found = model if isinstance(model, nn.Module) else getattr(model, "transformer", None)
    if not isinstance(found, nn.Module):
        raise PlanError(f"{type(model).__name__} is neither a torch.nn.Module nor a pipeline with a transformer")
    return found


def plan_of(student: Any) -> Plan:
    """The plan a converted model, or a pipeline's, was made by."""
    return converted_model(student).__dict__[PLAN]


@contextmanager
def teacher(student: Any) -> Iterator[Any]:
    """Inside, the converted model (or the pipeline's) runs its original attention, with its original weights."""
    model, runtime = converted_model(student), runtime_of(student)
    before = runtime.teaching
    with nullcontext() if before else original_weights(model):
        runtime.teaching = True
        try:
            yield student
        finally:
            runtime.teaching = before


def compile(student: Model, **options: Any) -> Model:
    """Regional torch.compile, in place: the repeated blocks that hold the sites, dynamic in resolution.

    Args:
        student: a converted model, or a pipeline with one.
        options: of torch.compile; `dynamic=True` and `fullgraph=True` unless given.
    """
    model = converted_model(student)
    for path in repeated_blocks(model):
        model.get_submodule(path).compile(**{**REGIONAL, **options})
    return student


def repeated_blocks(student: nn.Module) -> list[str]:
    """The modules in the model's lists of blocks that hold its attention."""
    blocks: dict[str, None] = {}
    for path in (site.path for site in plan_of(student).sites):
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        blocks[".".join(parts[: at + 1])] = None
    return list(blocks)
