"""The verbs: plan a conversion, do it, audit it, run the teacher, compile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from os import PathLike, fspath
from typing import Any, TypeVar, overload

import torch
from torch import nn

from edit_compile.adapters.load_model import LoadedModel, load_model
from edit_compile.adapters.pipelines import denoiser_of, with_denoiser
from edit_compile.adapters.record_inputs import inputs_of
from edit_compile.adapters.step_cache import step_cache_of
from edit_compile.config import LinearizeConfig
from edit_compile.designs.ops.kernels.choice import Kernels, choose_kernels
from edit_compile.errors import AuditError, ConfigError, EditCompileError, PlanError
from edit_compile.ir import input_spec
from edit_compile.ir.plan import Plan, SizesOfInputs
from edit_compile.passes.audit import Audit, allowed_at
from edit_compile.passes.audit import audit as audit_graph
from edit_compile.passes.capture import capture
from edit_compile.passes.pipeline import Passes
from edit_compile.passes.planner import CompiledPlan, compile_plan, recompile
from edit_compile.passes.site_graph import example_grid
from edit_compile.progress import working
from edit_compile.student.convert import install, require_plain
from edit_compile.student.grid import grid
from edit_compile.student.handle import conversion_of, plan_of, unwrap
from edit_compile.student.lora import leave_out_for_teachers
from edit_compile.student.runtime import Statement
from edit_compile.student.site import converted_sites
from edit_compile.student.weights import OriginalWeights, require_original_weights
from edit_compile.torch_internals import allow_graphs, keep_graphs_in_order, keep_strides

__all__ = ["audit", "block_options", "compile", "grid", "linearize", "plan", "plan_and_convert", "plan_of", "repeated_blocks", "teacher"]
__all__ += ["plan_with_forwards", "transformer_of"]

Model = TypeVar("Model")
_REGIONAL: dict[str, Any] = {"dynamic": True, "fullgraph": True}
_GRAPHS = 64  # of one kind of block: student, teacher and below `min_tokens`, with gradients and without, first and last blocks


def plan(
    model: Any,
    config: LinearizeConfig | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    passes: Passes | None = None,
) -> Plan:
    """Plan what `linearize` would do to a model, site by site, and why. The model is read, never run; meta weights are fine.

    Args:
        model: a transformer, a diffusers pipeline that has one, or a name as of `load_model`, whose weights are not loaded.
        config: see `LinearizeConfig`.
        example_inputs: keyword arguments of one forward, all sizes different; not needed for pipelines, which tell them, and
            models with an adapter (PixArt, SD3, FLUX, Qwen-Image, Wan, DiT, timm's ViTs, ...).
        passes: with passes of your own among them, `Passes().insert(mine, before="generate_method")`.

    Raises:
        ModelNotFoundError: the name leads nowhere.
        CaptureError: the model cannot be captured.
        PlanError: it has no attention, and says what was looked at; or it is converted already.
        NoExampleInputsError: no adapter knows the model, and no inputs were given.
    """
    return plan_with_forwards(model, config, example_inputs, passes).plan


def plan_with_forwards(
    model: Any, config: LinearizeConfig | None = None, example_inputs: Mapping[str, Any] | None = None, passes: Passes | None = None
) -> CompiledPlan:
    """Do `plan`, and return with it the new forwards of the sites, for `install`."""
    found, inputs = _with_inputs(model, example_inputs, structure_only=True)
    return _compiled(found, config, inputs, passes)


def plan_and_convert(
    model: Any, config: LinearizeConfig | None = None, example_inputs: Mapping[str, Any] | None = None
) -> tuple[Plan, nn.Module | None]:
    """Do `plan` and `linearize` in one, without the audit of the whole model.

    Returns:
        The plan, and the converted copy; None in its place where no site can be converted.
    """
    found, inputs = _with_inputs(model, example_inputs, structure_only=True)
    compiled = _compiled(found, config, inputs)
    return compiled.plan, install(found, compiled) if compiled.plan.rewritten else None


def _with_inputs(model: Any, example_inputs: Mapping[str, Any] | None, *, structure_only: bool) -> tuple[nn.Module, Mapping[str, Any]]:
    """Return the transformer that a name, a pipeline or a model stands for, and keyword arguments of one forward."""
    if isinstance(model, str | PathLike):
        model = load_model(fspath(model), structure_only=structure_only)
    found = transformer_of(model)
    if converted_sites(found):
        raise PlanError(f"{type(found).__name__} is converted already")
    require_plain(found)
    if example_inputs is not None:
        return found, example_inputs
    pipeline = model.pipeline if isinstance(model, LoadedModel) else None if found is model else model
    return found, inputs_of(found, pipeline)


def _compiled(
    model: nn.Module, config: LinearizeConfig | None, example_inputs: Mapping[str, Any], passes: Passes | None = None
) -> CompiledPlan:
    if config is not None and not isinstance(config, LinearizeConfig):
        raise ConfigError(f"config is a LinearizeConfig, not a {type(config).__name__}")
    if not (isinstance(example_inputs, Mapping) and all(isinstance(name, str) for name in example_inputs)):
        raise PlanError(
            f"example_inputs are keyword arguments of the model's forward, a dict by name, not a {type(example_inputs).__name__}"
        )
    return compile_plan(model, dict(example_inputs), config or LinearizeConfig(), passes)


@overload
def linearize(
    model: str | PathLike[str] | LoadedModel,
    config: LinearizeConfig | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    plan: Plan | None = None,
    passes: Passes | None = None,
) -> nn.Module: ...


@overload
def linearize(
    model: Model,
    config: LinearizeConfig | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    plan: Plan | None = None,
    passes: Passes | None = None,
) -> Model: ...


def linearize(
    model: Any,
    config: LinearizeConfig | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    plan: Plan | None = None,
    passes: Passes | None = None,
) -> Any:
    """Copy a model with its attention between image tokens made linear. Its images are wrong until it is distilled.

    The copy is of the model's class; weights outside the converted sites are shared with the original, which stays as
    it was. Given a diffusers pipeline, returns a pipeline with its transformer converted.

    Threads and asyncio tasks may run the copy at once: the grid of image tokens belongs to each call.

    Args:
        model: a transformer, a diffusers pipeline that has one, or a name as of `load_model`, or what that returned.
        config, example_inputs, passes: as for `plan`.
        plan: a plan made before; excludes config and example_inputs.

    Raises:
        PlanError: no site can be converted (shows the nearest miss), or the plan does not fit the model; otherwise as `plan`.
        RewriteError: a planned site cannot be rewritten.
        AuditError: a site is not what the plan says.
    """
    if plan is not None and (config is not None or example_inputs is not None):
        raise PlanError("give either a plan or config and example_inputs: a plan holds both")
    if plan is not None and not isinstance(plan, Plan):
        raise PlanError(f"plan is a Plan, as edit_compile.plan(model) makes it, not a {type(plan).__name__}")
    if plan is not None:
        found = load_model(fspath(model)).model if isinstance(model, str | PathLike) else transformer_of(model)
        require_plain(found)
        student = install(found, recompile(found, plan, passes))
    else:
        found, inputs = _with_inputs(model, example_inputs, structure_only=False)
        student = install(found, _compiled(found, config, inputs, passes))
        audit(student)
    is_pipeline = found is not model and not isinstance(model, str | PathLike | LoadedModel)
    return with_denoiser(model, student) if is_pipeline else student


def linearize_for_shards(loaded: LoadedModel, config: LinearizeConfig) -> nn.Module:
    """Do what `linearize` does, without copying a weight: what is mapped from files stays there until each process takes its shards of it.

    Nothing may be written to the model, or to the copy, before that.

    Raises:
        PlanError, RewriteError, AuditError: as `linearize`.
    """
    found, inputs = _with_inputs(loaded, None, structure_only=False)
    student = install(found, _compiled(found, config, inputs), read_only=True)
    audit(student)
    return student


def audit(student: Any) -> Audit:
    """Capture a converted model again and check as a whole that its rewritten sites are what its plan says.

    Every distinct site was checked on its own when it was compiled, by `plan`, `linearize` and `load` alike; `linearize`
    does this too for a plan that it makes itself.

    Args:
        student: a converted model, or what holds one: a pipeline, DDP, torch.compile, PEFT.

    Raises:
        AuditError: attention between image tokens, or another cost that grows with their square, is left at a rewritten site.
    """
    model, plan = unwrap(student), plan_of(student)
    sized = grid(model, *example_grid(plan.rewritten[0])) if not isinstance(plan.grid, SizesOfInputs) else nullcontext()
    with working("auditing the converted model"), sized:
        captured = capture(model, input_spec.decode(plan.inputs), symbolic=False)
    found = audit_graph(captured, {site.path: allowed_at(site) for site in plan.rewritten if site.kind == "attention"})
    if found.findings:
        more = f" (and {len(found.findings) - 1} more)" if len(found.findings) > 1 else ""
        raise AuditError(f"{plan.model} is not what its plan says: {found.findings[0]}{more}; please report this with the model's config")
    return found


def transformer_of(model: Any) -> nn.Module:
    """Return the model itself, or a pipeline's transformer or UNet.

    Raises:
        PlanError: neither.
    """
    if isinstance(model, LoadedModel):
        return model.model
    found = model if isinstance(model, nn.Module) else denoiser_of(model)
    if found is None:
        raise PlanError(f"{type(model).__name__} is neither a torch.nn.Module nor a pipeline with a transformer or a UNet")
    return found


@contextmanager
def teacher(student: Any, students: Iterable[str] = (), *, adapters: bool = False) -> Iterator[Any]:
    """Run the original attention with its original weights in the calls inside: bit for bit the original model, with its weights frozen
    as the student's are, for torch chooses some kernels by whether weights are trained.

    LoRA that PEFT or diffusers put on the student is left out, unless asked for.

    It holds for this thread or asyncio task, and for tasks begun inside: others go on calling the student. Blocks may
    overlap and be left in any order. A backward pass outside of the block runs checkpointed modules of a call inside as the
    teacher. After `unshare`, the calls inside run a copy of the module tree with the original weights, which
    `edit_compile.compile` has not compiled.

    Of two blocks inside each other, the inner one says which sites stay students.

    Args:
        student: a converted model, or what holds one: a pipeline, DDP, torch.compile, PEFT.
        students: paths of sites that run as converted all the same; of blocks compiled by `edit_compile.compile`, each gets a
            graph of its own then.
        adapters: run the original model with the LoRA that the student has now, in the sites too: by a copy of the module tree, which
            `edit_compile.compile` has not compiled.

    Yields:
        What was given.

    Raises:
        EditCompileError: nothing in it is converted, or nothing at one of the paths; weights outside the sites were written to
            without `unshare`, as by fusing LoRA or quantization; a cache across sampling steps is on; or, at a call, the weights that were
            trained there are sharded or offloaded.
    """
    model, conversion = unwrap(student), conversion_of(student)
    kept = frozenset((students,) if isinstance(students, str) else students)
    known = [site.path for site in conversion.plan.rewritten]
    if unknown := sorted(kept.difference(known)):
        near = get_close_matches(unknown[0], known, 3, 0)
        raise EditCompileError(f"no site at {unknown[0]!r} is converted; near it: {', '.join(near)}")
    if not torch.compiler.is_compiling():
        _require_no_step_cache(model)
        require_original_weights(model)
        leave_out_for_teachers(model)
    original = OriginalWeights(adapters) if conversion.originals or adapters else None
    with conversion.runtime.stating(Statement(teacher=True, original=original, students=kept)):
        yield student


def _require_no_step_cache(model: nn.Module) -> None:
    """Refuse to run the teacher where a cache gives out what the student left there, and the other way round.

    Raises:
        EditCompileError: there is one; says which.
    """
    if (cache := step_cache_of(model)) is not None:
        raise EditCompileError(
            f"{type(model).__name__} has a cache of sampling steps ({cache}), which would mix the teacher's outputs with the student's: "
            "take it off, as by disable_cache(), or run the original model"
        )


def compile(student: Model, *, kernels: Kernels = "auto", **options: Any) -> Model:
    """Compile the repeated blocks that hold the sites with torch.compile, in place, dynamic in resolution.

    Args:
        student: a converted model, or what holds one: a pipeline, DDP, PEFT.
        kernels: whether Triton kernels compute linear attention and the compressor where nothing is trained: "auto" where
            `measure_kernels` found them to win on this device, and nowhere if it never ran; "always"; or "never".
        options: of torch.compile; `dynamic=True` and `fullgraph=True` unless given.

    Returns:
        What was given.

    Raises:
        EditCompileError: nothing in it is converted.
        ConfigError: `kernels` is none of these words, or "always" without Triton and a CUDA device.
    """
    model = unwrap(student)
    choose_kernels(model, kernels)
    keep_graphs_in_order()  # for threads that call it at once
    for path in repeated_blocks(model):
        model.get_submodule(path).compile(**block_options(options))
    return student


def block_options(options: Mapping[str, Any] | None = None, *, graphs: int = _GRAPHS) -> dict[str, Any]:
    """Complete options of torch.compile by those that a repeated block is compiled with.

    Args:
        graphs: how many of them all blocks of one kind may have together.
    """
    return keep_strides(allow_graphs({**_REGIONAL, **(options or {})}, graphs))


def repeated_blocks(student: Any) -> list[str]:
    """List the paths of the modules in a converted model's lists of blocks that hold its attention."""
    blocks: dict[str, None] = {}
    for path in (site.path for site in plan_of(student).sites):
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        blocks[".".join(parts[: at + 1])] = None
    return list(blocks)
