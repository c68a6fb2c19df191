"""From a compiled plan to a converted model: a copy of the original whose sites are replaced at their own paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from edit_compile.errors import PlanError, RewriteError
from edit_compile.ir.plan import SitePlan
from edit_compile.ir.tokens import TokenKind
from edit_compile.passes.planner import CompiledPlan
from edit_compile.student.fingerprint import fingerprint
from edit_compile.student.grid import Runtime, publish_with
from edit_compile.student.site import install_site
from edit_compile.student.weights import check_finite, shared_copy

PLAN, FINGERPRINT = "edit_plan", "edit_fingerprint"  # attributes of a converted model: its plan, its original's fingerprint


def install(model: nn.Module, compiled: CompiledPlan) -> nn.Module:
    """Copy a model with the plan's sites converted.

    Raises:
        PlanError: the plan converts no site.
        RewriteError: a weight holds NaN or infinity.
    """
    plan = compiled.plan
    _require_some(plan.model, plan.sites)
    check_finite(model.named_parameters(), plan.model)
    student = shared_copy(model)
    runtime = Runtime(plan.grid)
    classes: dict[Any, type] = {}
    for site in plan.rewritten:
        install_site(student, site.path, compiled.forwards[site.path], runtime, classes)
    publish_with(student, runtime, [site.path for site in plan.rewritten])
    student.__dict__.update({PLAN: plan, FINGERPRINT: fingerprint(model.state_dict())})
    return student


def require_plain_forwards(model: nn.Module) -> None:
    """Offloading and layer-wise casting replace a module's forward by one of the instance's, which would go on running.

    Raises:
        RewriteError: a module's is.
    """
    for path, module in model.named_modules():
        if "forward" in module.__dict__:
            raise RewriteError(
                f"{path or type(model).__name__}: its forward was replaced, as by CPU offloading; convert first and enable that "
                "on the converted model (to undo it: pipe.remove_all_hooks(), accelerate.hooks.remove_hook_from_submodules(model))"
            )


def _require_some(model: str, sites: Sequence[SitePlan]) -> None:
    if any(site.rewritten for site in sites):
        return
    nearest = next((s for s in sites if s.query_layout.has(TokenKind.IMAGE) and s.key_layout.has(TokenKind.IMAGE)), sites[0])
    raise PlanError(
        f"{model}: none of {len(sites)} attention sites can be converted; "
        f"the nearest is {nearest.path}, {nearest.query_layout}: {nearest.reason}"
    )
