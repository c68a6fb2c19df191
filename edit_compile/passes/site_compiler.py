"""Compile sites: every distinct structure is rewritten once, equal sites share the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from edit_compile.config import Choice
from edit_compile.designs.base import Design
from edit_compile.errors import CaptureError, ConfigError, PlanError
from edit_compile.ir import input_spec
from edit_compile.ir.plan import PassRecord, Refusal, SitePlan
from edit_compile.ir.site import Site
from edit_compile.passes.capture import PROBE_DTYPE, CallArguments, call_arguments
from edit_compile.passes.pipeline import Passes, run_passes
from edit_compile.passes.plan_sites import Candidate, decided, refused, with_companions
from edit_compile.passes.site_graph import Declined, Refused, SiteGraph
from edit_compile.passes.structural_hash import structural_hash
from edit_compile.progress import each, working
from edit_compile.torch_internals import without_hooks


@dataclass(frozen=True)
class SiteForward:
    """What equal sites share: the generated forward, and what their design's module is built from."""

    forward: Callable[..., Any]
    design: type[Design]
    site: Site
    options: Any

    def build(self, path: str) -> Design:
        """Make the module of the site at a path."""
        built = self.design(replace(self.site, path=path), self.options)
        built.built_for = replace(self.site, path=""), self.options
        return built


@dataclass(frozen=True)
class _Compiled:
    """What came of one distinct structure: the number of the first choice that took it, or what each refused."""

    chosen: tuple[int, str, SiteForward] | None
    refusals: tuple[tuple[str, Refusal], ...]


@dataclass
class SiteCompiler:
    """Compiles the sites of one model.

    Attributes:
        inputs: keyword arguments of one forward of the whole model.
        probes: the dtypes that the model was captured in, None for its own; found out if left out.
        records: of the passes, structure by structure.
    """

    model: nn.Module
    inputs: Mapping[str, Any]
    passes: Passes
    probes: tuple[torch.dtype | None, ...] | None = None
    records: list[PassRecord] = field(default_factory=list)
    _arguments: CallArguments = field(default_factory=lambda: CallArguments({}, PROBE_DTYPE))
    _shared: frozenset[str] = frozenset()  # paths of one module each, with another path
    _done: dict[Any, _Compiled] = field(default_factory=dict)

    def prepare(self, paths: Iterable[str]) -> None:
        """Find out, in one forward on the meta device, what each site's module receives."""
        wanted = set(paths)
        uses = Counter(self.model.get_submodule(path) for path in wanted)
        self._shared = frozenset(path for path in wanted if uses[self.model.get_submodule(path)] > 1)
        if wanted:
            self._arguments = call_arguments(self.model, self.inputs, wanted, self.probes)

    def compile(self, candidate: Candidate) -> tuple[SitePlan, SiteForward | None]:
        """Decide on a site: its plan, and its forward if it is rewritten.

        Raises:
            AuditError: a design is not what it says.
        """
        if not candidate.choices:
            return candidate.plan, None
        found = self._compiled(candidate)
        if found.chosen is None:
            return refused(candidate, found.refusals), None
        number, reason, forward = found.chosen
        return decided(candidate, candidate.choices[number], reason), forward

    def _compiled(self, candidate: Candidate) -> _Compiled:
        plan = candidate.plan
        module, arguments = self.model.get_submodule(plan.path), self._arguments.by_path.get(plan.path)
        if arguments is None or isinstance(arguments, Refusal):
            never_called = Refusal(reason="the module's own forward is not called")
            return _Compiled(None, (("", _for_equal_sites(arguments or never_called, plan.path)),))
        if plan.path in self._shared:
            return _Compiled(None, (("", Refusal(reason="one module, with one set of weights, is this site and others")),))
        try:
            spec = str(input_spec.encode(arguments))
        except PlanError as error:
            return _Compiled(None, (("", Refusal(reason=f"an object among the arguments of its forward: {error}")),))
        facts = plan.model_copy(update={"path": "", "index": 0, "grid": None}).model_dump_json()
        grid_dims = len(plan.grid.sizes) if plan.grid is not None else None
        designs = str([(choice.design, choice.options) for choice in candidate.choices])  # whatever rule they are of
        key = (structural_hash(module), spec, facts, grid_dims, designs)
        if key not in self._done:
            self._done[key] = self._attempt(module, candidate)
        return self._done[key]

    def _attempt(self, module: nn.Module, candidate: Candidate) -> _Compiled:
        """Try the choices in order. What a design refuses by the facts alone is told only if none failed at the rewrite."""
        verdicts: list[tuple[str, Refusal]] = []
        failures: list[tuple[str, Refusal]] = []
        for number, choice in enumerate(candidate.choices):
            if choice.design is None:
                break
            try:
                site = self._site_graph(module, candidate.plan, choice)
                self.records += run_passes(self.passes.site, site, candidate.plan.path, lambda at: at.graph)
            except (Refused, CaptureError, ConfigError, PlanError) as error:
                found = error.refusal if isinstance(error, Refused) else Refusal(reason=str(error))
                reason = _for_equal_sites(found, candidate.plan.path)
                (verdicts if isinstance(error, Declined) else failures).append((choice.design.name, reason))
                continue
            assert site.forward is not None
            forward = SiteForward(site.forward, choice.design, site.facts, choice.options)
            return _Compiled((number, site.verdict, forward), ())
        return _Compiled(None, tuple(failures or verdicts))

    def _site_graph(self, module: nn.Module, plan: SitePlan, choice: Choice) -> SiteGraph:
        module = without_hooks(module)  # they are no part of its forward, and go on running around the one that it gets
        captured = self._arguments.capture(module, plan.path)
        return SiteGraph(module, captured.inputs, captured, plan, choice, captured.graph)


def _for_equal_sites(refusal: Refusal, path: str) -> Refusal:
    """Take the path of the site that was tried out of a refusal: it holds for all equal ones."""
    return refusal.model_copy(update={"reason": refusal.reason.removeprefix(f"{path}: ")})


def compile_sites(compiler: SiteCompiler, candidates: Sequence[Candidate]) -> tuple[tuple[SitePlan, ...], dict[str, SiteForward]]:
    """Compile all candidates, attention before the networks beside it: their plans, and the forwards of rewritten ones, by path."""
    with working("planning: what each site receives"):
        compiler.prepare(candidate.plan.path for candidate in candidates if candidate.choices)
    plans, forwards = [], {}
    attention: dict[str, SitePlan] = {}
    for candidate in each(candidates, "planning: sites", len(candidates)):
        plan, forward = compiler.compile(with_companions(candidate, attention))
        plans.append(plan)
        if plan.kind == "attention":
            attention[plan.path] = plan
        if forward is not None:
            forwards[plan.path] = forward
    return tuple(plans), forwards
