"""From a plan to a converted model: every distinct site structure is rewritten once, equal sites share the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from edit_compile.config import LinearizeConfig
from edit_compile.designs import find_design
from edit_compile.errors import CaptureError, ConfigError, PlanError, RewriteError
from edit_compile.ir.input_spec import describe
from edit_compile.ir.plan import Plan, SitePlan
from edit_compile.ir.tokens import TokenKind
from edit_compile.passes.capture import call_arguments, capture
from edit_compile.passes.codegen import generate_forward
from edit_compile.passes.rewrite import rewrite_site
from edit_compile.passes.structural_hash import structure_key
from edit_compile.student.fingerprint import fingerprint
from edit_compile.student.grid import Runtime, publish_with
from edit_compile.student.site import SiteForward, install
from edit_compile.student.weights import check_finite, shared_copy

PLAN, FINGERPRINT = "edit_plan", "edit_fingerprint"  # attributes of a converted model: its plan, its original's fingerprint


@dataclass
class SiteRewriter:
    """Rewrites the sites of one model. `inputs` are keyword arguments of one forward of the whole model."""

    model: nn.Module
    inputs: Mapping[str, Any]
    config: LinearizeConfig
    _done: dict[Any, SiteForward | RewriteError] = field(default_factory=dict)
    _arguments: dict[str, dict[str, Any]] = field(default_factory=dict)

    def prepare(self, sites: Iterable[SitePlan]) -> None:
        """Find out, in one forward on the meta device, what each site's module receives."""
        paths = {site.path for site in sites}
        self._arguments = call_arguments(self.model, self.inputs, paths) if paths else {}

    def forward_for(self, site: SitePlan) -> SiteForward | RewriteError:
        """The site's new forward, or why there is none."""
        module, arguments = self.model.get_submodule(site.path), self._arguments[site.path]
        key = (structure_key(module), str(describe(arguments)), site.action, site.query_layout, site.query_sizes)
        if key not in self._done:
            try:
                self._done[key] = self._rewritten(module, arguments, site)
            except (RewriteError, CaptureError, PlanError, ConfigError) as error:
                self._done[key] = RewriteError(str(error))
        return self._done[key]

    def _rewritten(self, module: nn.Module, arguments: dict[str, Any], site: SitePlan) -> SiteForward:
        captured = capture(module, arguments, functional=True, cast=False)
        rewritten = rewrite_site(captured, module, site, self.config)
        with torch.device("meta"):  # do the options fit this site's channels?
            find_design(rewritten.additions.design).build(rewritten.additions, self.config)
        return SiteForward(generate_forward(rewritten.graph, captured, module, arguments), rewritten.additions)


def converted(model: nn.Module, plan: Plan, rewriter: SiteRewriter) -> nn.Module:
    """A copy of the model with the plan's sites converted.

    Raises:
        PlanError: the plan converts no site.
        RewriteError: a planned site cannot be rewritten, or a weight holds NaN or infinity.
    """
    _require_some(plan.model, plan.sites)
    check_finite(model.named_parameters(), plan.model)
    student = shared_copy(model)
    runtime = Runtime(plan.grid)
    classes: dict[Any, type] = {}
    for site in plan.rewritten:
        forward = rewriter.forward_for(site)
        if isinstance(forward, RewriteError):
            raise forward
        install(student, site.path, forward, plan.config, runtime, classes)
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
