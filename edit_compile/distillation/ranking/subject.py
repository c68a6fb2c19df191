"""What is ranked: a model with its data, and what each candidate makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edit_compile.adapters.denoise import denoise
from edit_compile.adapters.load_model import LoadedModel, load_model
from edit_compile.adapters.pipeline_calls import call_as_recorded
from edit_compile.api import plan_with_forwards
from edit_compile.distillation.context import Context, trained_parameters
from edit_compile.distillation.data import DataSource, open_source
from edit_compile.distillation.data.source import check_size
from edit_compile.distillation.models import check_data, noise_schedule
from edit_compile.distillation.ranking.folder import CandidateFolder, RankingFolder
from edit_compile.distillation.ranking.ranking import DesignCandidate
from edit_compile.distillation.recipe.schedule import Phase, phases_of
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.distillation.train.distributed import make_accelerator, set_precision
from edit_compile.errors import CheckpointError, ConfigError, DistillError
from edit_compile.ir.plan import SiteKind, SitePlan
from edit_compile.passes.planner import CompiledPlan
from edit_compile.progress import working
from edit_compile.student.checkpoint_format import read_index, read_tensors
from edit_compile.student.convert import install
from edit_compile.student.hub import find_checkpoint

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class RankedModel:
    """A model as it is, with its data, and every candidate's plan and fit."""

    recipe: Recipe
    candidates: tuple[DesignCandidate, ...]
    folder: RankingFolder

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model as it is, on the run's device."""
        if find_checkpoint(self.recipe.model) is not None:
            raise DistillError(f"{self.recipe.model} is converted already: rank the model that it was made from")
        torch.manual_seed(self.recipe.seed)  # of random weights
        data, name = self.recipe.data, self.recipe.model
        with working(f"loading {name}"):
            check_data(self.recipe, load_model(name, structure_only=True))
            loaded = load_model(name, dtype=self.recipe.dtype, random_weights=data.random_weights)
        if not loaded.has_weights:
            raise DistillError(f"{name} is structure only, without weights; data: {{kind: random}} ranks it with random weights")
        loaded.model.to(self.accelerator.device)
        return loaded

    @property
    def base(self) -> str:
        """Where the model is."""
        return self.loaded.pipeline or self.loaded.source

    @cached_property
    def accelerator(self) -> Accelerator:
        """The run's device, in one process."""
        accelerator = make_accelerator(self.recipe, self.folder.path)
        if accelerator.num_processes > 1:
            raise DistillError("a ranking runs in one process: start it without `accelerate launch`")
        return accelerator

    @cached_property
    def source(self) -> DataSource:
        """The recipe's data."""
        options: dict[str, Any] = {"base": self.base, "device": self.accelerator.device, "dtype": self.recipe.dtype}
        source = open_source(self.recipe.data, self.loaded.model, self.recipe.seed, **options)
        check_size(source, self.phase.height, self.phase.width, self.phase.frames)
        return source

    @cached_property
    def phase(self) -> Phase:
        """The layerwise fit; errors are measured at its size."""
        return phases_of(self.recipe)[0]

    def context(self, student: nn.Module) -> Context:
        """Place a converted model, and return what fitting and measuring it need."""
        set_precision(student.eval(), set(trained_parameters(student, self.recipe.train)), self.recipe.precision)
        student.to(self.accelerator.device)
        called = call_as_recorded if self.recipe.data.recorded_calls else denoise
        schedule = noise_schedule(self.recipe, self.base)
        return Context(self.recipe, student, student, self.source, called, schedule, self.accelerator)

    # ------------------------------------------------------------------ the candidates

    @cached_property
    def compiled(self) -> list[CompiledPlan]:
        """Every candidate's plan for all sites."""
        rules = self.recipe.convert
        found = [plan_with_forwards(self.loaded, candidate.config(rules.include, rules.exclude)) for candidate in self.candidates]
        for candidate, compiled in zip(self.candidates, found, strict=True):
            if not _taken(candidate, compiled):
                reasons = dict.fromkeys(site.reason for site in compiled.plan.sites if site.kind in candidate.kinds)
                raise ConfigError(f"the candidate {candidate} takes no site of {compiled.plan.model}: {'; '.join(reasons)}")
        return found

    @cached_property
    def taken(self) -> list[dict[str, SitePlan]]:
        """The sites that each candidate takes, by path, without those of the designs that it brings."""
        return [_taken(candidate, compiled) for candidate, compiled in zip(self.candidates, self.compiled, strict=True)]

    @cached_property
    def sites(self) -> dict[str, SiteKind]:
        """The kinds of the sites of the candidates' kinds, by path, also of those that none takes.

        In order of execution; where there are several kinds, whose orders are known each for itself, in that of the model's modules.
        """
        kinds, plans = {kind for candidate in self.candidates for kind in candidate.kinds}, [each.plan for each in self.compiled]
        found = {site.path: site.kind for plan in plans for site in plan if site.kind in kinds and site.path}
        if len(kinds) == 1:
            return found
        places = {name: place for place, (name, _) in enumerate(self.loaded.model.named_modules())}
        return dict(sorted(found.items(), key=lambda item: places.get(item[0], len(places))))

    def candidate_folder(self, number: int) -> CandidateFolder:
        """Return the folder of a candidate's fit."""
        return self.folder.candidate(self.candidates[number])

    def converted(self, number: int) -> nn.Module:
        """Convert all sites that a candidate takes; what that adds is the same at every call."""
        torch.manual_seed(self.recipe.seed)
        return install(self.loaded.model, self.compiled[number])

    def fitted(self, number: int) -> nn.Module:
        """Convert all sites that a candidate takes, with the weights of its fit."""
        student = self.converted(number)
        self.load_fit(student, number, [site.path for site in self.compiled[number].plan.rewritten])
        return student

    def load_fit(self, student: nn.Module, number: int, paths: Sequence[str]) -> None:
        """Give some sites the weights of a candidate's fit.

        Raises:
            CheckpointError: it is damaged.
        """
        folder, own = self.candidate_folder(number).path, tuple(f"{path}." for path in paths)
        index = read_index(folder)
        tensors = {name: tensor for name, tensor in read_tensors(folder, index).items() if name.startswith(own)}
        problem = student.load_state_dict(tensors, strict=False)
        strange = [*(name for name in problem.missing_keys if name.startswith(own)), *problem.unexpected_keys]
        if strange:
            raise CheckpointError(f"{folder} is not a fit of {self.candidates[number]}: {strange[0]}; remove it, and it is fitted again")


def _taken(candidate: DesignCandidate, compiled: CompiledPlan) -> dict[str, SitePlan]:
    return {site.path: site for site in compiled.plan.rewritten if site.kind in candidate.kinds}
