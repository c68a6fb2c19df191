"""Sets of sites, each with its candidate: converted at once with the weights of the fits, and measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from edit_compile.api import plan_with_forwards
from edit_compile.distillation.evaluate.validation import validate
from edit_compile.distillation.ranking.choose import Selection
from edit_compile.distillation.ranking.folder import SetError
from edit_compile.distillation.ranking.ranking import CheckedSet, Ranking
from edit_compile.distillation.ranking.subject import RankedModel
from edit_compile.errors import DistillError
from edit_compile.ir.plan import SitePlan
from edit_compile.passes.planner import CompiledPlan
from edit_compile.progress import working
from edit_compile.student.checkpoint import save
from edit_compile.student.convert import install


@dataclass
class Sets:
    """The sets of one ranking."""

    model: RankedModel

    def checked(self, ranking: Ranking, budget: str, *, keep: bool) -> CheckedSet:
        """Convert what a budget chooses, as fitted, and measure it, unless that was done; with `keep` the student is saved."""
        return self.measured(ranking, ranking.choose(budget), keep=keep)

    def measured(self, ranking: Ranking, selection: Selection, *, keep: bool = False) -> CheckedSet:
        """Convert some sites, as fitted, and measure them, unless that was done; with `keep` the student is saved."""
        budget, folder = selection.budget.text, self.model.folder
        converted = {path: measure.candidate for path, measure in selection.converted.items()}
        fits = {path: self.model.candidate_folder(number).fit for path, number in converted.items()}
        measured = folder.sets().of(fits)
        if measured is None or keep:
            student = self._converted(ranking, selection, converted)
            if keep:
                save(student, folder.chosen(budget), base=self.model.base)
            if measured is None:
                measured = self._error(student, budget)
                folder.add(SetError(converted=fits, measured=measured))
        return CheckedSet(sites=budget, converted=converted, flops=selection.flops, predicted=selection.error, measured=measured)

    def _error(self, student: nn.Module, budget: str) -> float:
        phase = self.model.phase
        with working(f"{budget}: all of its sites at once"):
            return validate(self.model.context(student), phase.height, phase.width, phase.frames).total

    def _converted(self, ranking: Ranking, selection: Selection, numbers: Mapping[str, int]) -> nn.Module:
        """Convert the chosen sites, each with the weights of its candidate's fit."""
        compiled = self._compiled(ranking, selection, numbers)
        kept = next((site for site in compiled.plan if site.path in numbers and not site.rewritten), None)
        if kept is not None:
            raise DistillError(f"sites: {selection.budget.text}: {kept.path} is not converted together with the others: {kept.reason}")
        student = install(self.model.loaded.model, compiled)
        for number in sorted(set(numbers.values())):
            self.model.load_fit(student, number, [path for path in numbers if numbers[path] == number])
        return student

    def _compiled(self, ranking: Ranking, selection: Selection, numbers: Mapping[str, int]) -> CompiledPlan:
        """Put a plan together from those of the candidates, where they list the same sites and have one source of the grid.

        Where they do not, it is made anew.
        """
        model, rules = self.model, ranking.rules_of(selection)
        used = [model.compiled[number] for number in sorted(set(numbers.values()))]
        kinds = [model.candidates[number].kinds for number in sorted(set(numbers.values()))]
        if any(each.plan.grid != used[0].plan.grid for each in used) or any(kind != kinds[0] for kind in kinds):
            return plan_with_forwards(model.loaded, ranking.config_of(selection))

        def planned(site: SitePlan) -> SitePlan:
            if site.path in numbers:
                chosen = model.taken[numbers[site.path]][site.path]
                return chosen.model_copy(update={"reason": f"{chosen.reason}; {rules[site.path].reason}"})
            outside = site.path in rules and any(site.path in taken for taken in model.taken)
            return site.kept(rules[site.path].reason) if outside else site

        listed = [site for site in used[0].plan.sites if not site.rewritten or site.path in rules]  # not what a design brings
        sites = tuple(planned(site) for site in listed)
        forwards = {path: model.compiled[number].forwards[path] for path, number in numbers.items()}
        return CompiledPlan(used[0].plan.model_copy(update={"sites": sites}), forwards)
