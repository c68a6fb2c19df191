"""From a compiled plan to a converted model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.adapters.pipelines import origin_of
from edit_compile.errors import GridError, PlanError, RewriteError
from edit_compile.ir import input_spec
from edit_compile.ir.plan import Plan, SizesOfInputs
from edit_compile.ir.symbol_names import readable_names
from edit_compile.ir.tokens import TokenKind
from edit_compile.passes.planner import CompiledPlan
from edit_compile.student.fingerprint import fingerprint
from edit_compile.student.handle import Conversion, ConvertedModel
from edit_compile.student.lora import adapted_layers
from edit_compile.student.runtime import RestoreForRecompute, Runtime
from edit_compile.student.save import saving_both
from edit_compile.student.site import class_of_site, convert_site
from edit_compile.student.weights import check_finite, moving, original_below, record_shared, shared_copy
from edit_compile.torch_internals import is_compiled_module, is_quantized


def install(model: nn.Module, compiled: CompiledPlan, *, read_only: bool = False) -> ConvertedModel:
    """Copy a model, and convert the sites of the copy that the plan rewrites.

    Args:
        read_only: nothing is written to the weights, of the model or of the copy, until they are sharded: all share the model's memory.

    Raises:
        PlanError: the plan converts no site.
        RewriteError: a weight holds NaN or infinity, or one that would be trained is quantized.
    """
    plan = compiled.plan
    if not plan.rewritten:
        raise PlanError(_nothing_to_convert(plan))
    for site in plan.rewritten:
        _require_trainable(model.get_submodule(site.path), site.path)
    check_finite(model.named_parameters(), plan.model)
    student = shared_copy(model, read_only=read_only)
    conversion = Conversion(plan, fingerprint(model.state_dict()), Runtime(plan), origin_of(model))
    _check_grids(model, conversion.runtime)
    classes: dict[Any, type[nn.Module]] = {}  # one for each original class and forward
    for site in plan.rewritten:
        compiled_site, original = compiled.forwards[site.path], type(student.get_submodule(site.path))
        key = (original, id(compiled_site.forward))
        if key not in classes:
            classes[key] = class_of_site(original, compiled_site.forward, is_attention=site.kind == "attention")
        convert_site(student, site.path, compiled_site, classes[key], conversion, conversion.runtime.source.index_of(site), read_only)
    for path in _holders(plan):
        student.get_submodule(path).register_forward_hook(RestoreForRecompute(conversion.runtime))
    student.__dict__["edit_conversion"] = conversion
    student.__class__ = _class_of_model(type(student))
    assert isinstance(student, ConvertedModel)
    record_shared(student)
    return student


def _check_grids(model: nn.Module, runtime: Runtime) -> None:
    """Compare the grids that a plan's expressions give for its own example with those that it says the example has.

    Raises:
        PlanError: they differ.
    """
    plan = runtime.plan
    if not isinstance(plan.grid, SizesOfInputs) or plan.grid.images is not None:
        return
    try:
        grids = runtime.source.sizes(model, (), input_spec.decode(plan.inputs), None)
    except (GridError, ArithmeticError) as error:
        raise PlanError(f"the plan's grid does not follow from its own example inputs: {error}") from None
    for site in plan.rewritten:
        (found,) = grids[runtime.source.index_of(site)]
        if site.grid_sizes and found != site.grid_sizes:
            raise PlanError(f"the plan's grid of {site.path} is {found} in its own example, not {site.grid_sizes}: make the plan again")


def _holders(plan: Plan) -> list[str]:
    """List the paths of the sites and of all modules that hold one, but the model itself."""
    parts = [site.path.split(".") for site in plan.rewritten]
    return sorted({".".join(path[:depth]) for path in parts for depth in range(1, len(path) + 1)})


def _class_of_model(original: type[nn.Module]) -> type[nn.Module]:
    """Make a model's class, under the name of its own: libraries write it into their files."""
    run = original.forward

    @functools.wraps(run)
    def forward(model: ConvertedModel, *args: Any, **kwargs: Any) -> Any:
        return model.edit_conversion.runtime.run(run, model, args, kwargs, original_below)

    def _apply(model: ConvertedModel, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        moving(model, lambda: original._apply(model, fn, recurse))  # type: ignore[no-untyped-call]
        return model

    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (ConvertedModel, original), {**names, "forward": forward, "_apply": _apply, **saving_both(original)})


def require_plain(model: nn.Module) -> None:
    """Refuse a model with adapters, TorchScript, and a module with a forward of the instance's, as offloading and layer-wise casting give
    it: that one would go on running.

    Raises:
        RewriteError: there is one; says where.
    """
    if adapted := adapted_layers(model):
        raise RewriteError(
            f"the model has adapters (LoRA), as at {next(iter(adapted))}: convert it without, and load them on the converted model, or "
            "make them part of its weights first, by pipe.fuse_lora() and pipe.unload_lora_weights() or by PEFT's merge_and_unload()"
        )
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise RewriteError(f"{path or type(model).__name__} is TorchScript: convert the module that it was made from")
        if "forward" in module.__dict__ and not (path and is_compiled_module(module)):
            raise RewriteError(
                f"{path or type(model).__name__}: its forward was replaced, as by CPU offloading; convert first and enable that "
                "on the converted model (to undo it: pipe.remove_all_hooks(), accelerate.hooks.remove_hook_from_submodules(model))"
            )


def _require_trainable(module: nn.Module, path: str) -> None:
    for name, parameter in module.named_parameters():
        if is_quantized(parameter):
            raise RewriteError(
                f"{path}.{name} is quantized ({type(parameter).__name__}) and would be trained: convert the model before it is quantized, "
                "and quantize the student when it is distilled"
            )


def _nothing_to_convert(plan: Plan) -> str:
    image = TokenKind.IMAGE
    nearest = next((s for s in plan.sites if s.query_layout.has(image) and s.key_layout.has(image)), plan.sites[0])
    return (
        f"{plan.model}: none of {len(plan.sites)} attention sites can be converted; "
        f"the nearest is {nearest.path}, {readable_names(plan).layout(nearest.query_layout)}: {nearest.reason}"
    )
