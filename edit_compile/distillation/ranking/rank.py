"""Ranking a model's sites: fit every candidate, measure every site, choose, and measure what was chosen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import nn

from edit_compile.adapters.denoise import denoise
from edit_compile.adapters.family import Extent
from edit_compile.adapters.load_model import LoadedModel, load_model
from edit_compile.adapters.pipeline_calls import call_as_recorded
from edit_compile.api import plan_with_forwards
from edit_compile.bench import video_size
from edit_compile.distillation.context import Context, trained_parameters
from edit_compile.distillation.data import DataSource, open_source
from edit_compile.distillation.evaluate.validation import validate
from edit_compile.distillation.models import check_frames_of, noise_schedule
from edit_compile.distillation.ranking.budget import parse_budget
from edit_compile.distillation.ranking.choose import Selection
from edit_compile.distillation.ranking.folder import RankingFolder
from edit_compile.distillation.ranking.measure import Progress, Report, count_costs, errors_of, fit, measure_errors, measure_times
from edit_compile.distillation.ranking.plot import plot_ranking
from edit_compile.distillation.ranking.ranking import CheckedSet, DesignCandidate, Measure, RankedSite, Ranking, parse_candidates
from edit_compile.distillation.ranking.tables import markdown
from edit_compile.distillation.recipe.load import find_recipe, load_recipe, shipped_recipes
from edit_compile.distillation.recipe.schedule import Phase, phases_of
from edit_compile.distillation.recipe.schema import LayerwiseFit, Recipe, SampleGrids
from edit_compile.distillation.train.distributed import make_accelerator, set_precision
from edit_compile.distillation.train.interrupt import Interrupt, interruptible
from edit_compile.errors import CheckpointError, ConfigError, DistillError, Interrupted
from edit_compile.files import write_text
from edit_compile.ir.plan import SitePlan
from edit_compile.passes.planner import CompiledPlan
from edit_compile.student.checkpoint import INDEX, save
from edit_compile.student.checkpoint_format import read_index, read_tensors
from edit_compile.student.convert import install
from edit_compile.student.fingerprint import fingerprint

if TYPE_CHECKING:
    from accelerate import Accelerator

STEPS = 300  # of the layerwise fit where the recipe has none
_CHECKS = 4  # sets that are converted as a whole, from a quarter of what can be saved to all of it


def rank(
    model: str,
    output: str | Path | None = None,
    *,
    recipe: Recipe | str | Path | None = None,
    candidates: Sequence[str | Mapping[str, Any]] | None = None,
    sites: Sequence[str] = (),
    size: Extent | None = None,
    steps: int | None = None,
    time: bool = False,
    report: Report | None = None,
) -> Ranking:
    """Measure what converting each of a model's sites does to its output, and saves.

    What the folder holds already is not measured again, whatever stopped it.

    Args:
        model: as of `load_model`, with weights.
        output: the folder to write: `ranking.json`, `ranking.md`, `pareto.png`. Default: `rankings/` and the model's name.
        recipe: where data, layerwise fit, validation and seed come from. Default: the shipped recipe for this model.
        candidates: the designs that compete for the sites: names, or `{"design": NAME, option: value}`. Default: the recipe's design.
            The sites of another kind that a design brings stay as they are.
        sites: budgets, as of `Ranking.choose`. What each chooses is converted, measured, and saved in the folder's `chosen/`.
        size: in pixels, at which FLOPs are counted and time is measured. Default: the recipe's last stage's.
        steps: of the layerwise fit. Default: the recipe's.
        time: measure every site's time as well.
        report: told how far it is.

    Raises:
        ConfigError, RecipeError: a candidate, a budget or the recipe is wrong, or a candidate takes no site.
        DistillError: the data cannot be opened, or the folder has another ranking.
        Interrupted: SIGINT or SIGTERM arrived; the same call continues.
    """
    for budget in sites:
        parse_budget(budget)
    settled = ranking_recipe(model, recipe, steps)
    competing = parse_candidates(list(candidates)) if candidates is not None else (_design_of(settled),)
    folder = RankingFolder(Path(output) if output is not None else Path("rankings") / Path(model).name)
    ranker = Ranker(settled, competing, size, folder, time, report or (lambda progress: None))
    with interruptible() as interrupt:
        return ranker.run(sites, interrupt)


def ranking_recipe(model: str, recipe: Recipe | str | Path | None = None, steps: int | None = None) -> Recipe:
    """Make the recipe that a model is ranked with: a layerwise fit of its attention, and its validation.

    Raises:
        RecipeError: it cannot be read, or none was given and not one of the shipped ones is for this model.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe if recipe is not None else recipe_for(model))
    fitted = recipe.layerwise or LayerwiseFit(
        steps=STEPS, global_batch_size=recipe.stages[0].global_batch_size, micro_batch_size=recipe.stages[0].micro_batch_size
    )
    changed = {
        "model": model,
        "layerwise": fitted.model_copy(update={"steps": steps} if steps is not None else {}),
        "train": "inserted" if recipe.train == "inserted" else "attention",
        "lora": None,
        "samples": SampleGrids(),
    }
    return recipe.model_copy(update=changed)


def recipe_for(model: str) -> str:
    """Find the shipped recipe for a model.

    Raises:
        ConfigError: there is none, or more than one.
    """
    found = [name for name in shipped_recipes() if _model_of(name) == model]
    if len(found) != 1:
        problem = f"{' and '.join(found)} are for {model}" if found else f"no shipped recipe is for {model}"
        raise ConfigError(f"{problem}: name one with --recipe (recipe=); it says which data to measure on")
    return found[0]


def _model_of(name: str) -> Any:
    return yaml.safe_load(find_recipe(name).read_text())["model"]


def _design_of(recipe: Recipe) -> DesignCandidate:
    """Return the design of a recipe as the one candidate; "auto" where it has rules."""
    return DesignCandidate(design=recipe.convert.design, options=recipe.convert.options)


@dataclass
class Ranker:
    """One ranking.

    Attributes:
        given_size: at which FLOPs are counted; None for the last stage's.
    """

    recipe: Recipe
    candidates: tuple[DesignCandidate, ...]
    given_size: Extent | None
    folder: RankingFolder
    time: bool
    report: Report

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model as it is, on the run's device."""
        if (Path(self.recipe.model) / INDEX).is_file():
            raise DistillError(f"{self.recipe.model} is converted already: rank the model that it was made from")
        torch.manual_seed(self.recipe.seed)  # of random weights
        data, name = self.recipe.data, self.recipe.model
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
        source.check(self.phase.height, self.phase.width, *([] if self.phase.frames is None else [self.phase.frames]))
        return source

    @cached_property
    def phase(self) -> Phase:
        """The layerwise fit; errors are measured at its size."""
        return phases_of(self.recipe)[0]

    @cached_property
    def size(self) -> Extent:
        """The size in pixels at which FLOPs are counted."""
        last = phases_of(self.recipe)[-1]
        return self.given_size or video_size(last.height, last.width, last.frames)

    @cached_property
    def compiled(self) -> list[CompiledPlan]:
        """Every candidate's plan for all sites."""
        rules = self.recipe.convert
        found = [plan_with_forwards(self.loaded, candidate.config(rules.include, rules.exclude)) for candidate in self.candidates]
        for candidate, compiled in zip(self.candidates, found, strict=True):
            if not self._taken(candidate, compiled):
                reasons = dict.fromkeys(site.reason for site in compiled.plan.sites if site.kind in candidate.kinds)
                raise ConfigError(f"the candidate {candidate} takes no site of {compiled.plan.model}: {'; '.join(reasons)}")
        return found

    @cached_property
    def taken(self) -> list[dict[str, SitePlan]]:
        """The sites that each candidate takes, by path, without those of the designs that it brings."""
        return [self._taken(candidate, compiled) for candidate, compiled in zip(self.candidates, self.compiled, strict=True)]

    def _taken(self, candidate: DesignCandidate, compiled: CompiledPlan) -> dict[str, SitePlan]:
        return {site.path: site for site in compiled.plan.rewritten if site.kind in candidate.kinds}

    def run(self, sites: Sequence[str], interrupt: Interrupt) -> Ranking:
        """Measure what is not measured yet, and write the folder.

        Raises:
            Interrupted, DistillError, ConfigError: as `rank`.
        """
        weights = json.dumps({name: [each.shape, each.values] for name, each in fingerprint(self.loaded.model.state_dict()).items()})
        self.folder.open(self.recipe, hashlib.sha256(weights.encode()).hexdigest())
        check_frames_of(self.recipe, self.loaded.model)
        for number in range(len(self.candidates)):
            self._measure(number, interrupt)
        ranking = self._assembled()
        for budget in sites:
            ranking.choose(budget)  # whatever is wrong with one is told before the first is converted
        previous = self.folder.previous()
        known = previous.checked if previous is not None and _measured_alike(previous, ranking) else ()
        ranking = ranking.model_copy(update={"checked": known})
        self._write(ranking)
        for budget in dict.fromkeys([*_default_budgets(ranking), *(parse_budget(text).text for text in sites)]):
            if interrupt.requested:
                raise Interrupted("stopped before all chosen sets were converted and measured")
            ranking = self._checked(ranking, budget, keep=budget in [parse_budget(text).text for text in sites])
            self._write(ranking)
        write_text(self.folder.path / "ranking.md", markdown(ranking))
        plot_ranking(ranking, self.folder.path / "pareto.png")
        return ranking

    # ------------------------------------------------------------------ one candidate

    def _measure(self, number: int, interrupt: Interrupt) -> None:
        candidate, paths = self.candidates[number], list(self.taken[number])
        folder, name = self.folder.candidate(candidate), str(candidate)
        if not folder.fitted:
            torch.manual_seed(self.recipe.seed)  # of what conversion adds
            context = self._context(install(self.loaded.model, self.compiled[number]))
            fit(context, self.phase, folder, self.base, interrupt, self.report, name)
        if folder.errors().batches * self.recipe.validation.batch_size < self.recipe.validation.samples:
            measure_errors(self._context(self._fitted(number)), self.phase, paths, folder, interrupt, self.report, name)
        if folder.costs(self.size) is None:
            folder.write(count_costs(self._fitted(number), self.size, paths, self.loaded.pipeline), self.size)
        if self.time and folder.times(self.size) is None:
            self.report(Progress(f"{name}: timing {len(paths)} sites", 0, 1))
            folder.write(measure_times(self._fitted(number), self.size, paths), self.size)

    def _fitted(self, number: int) -> nn.Module:
        """Convert all sites that a candidate takes, with the weights of its fit."""
        student = install(self.loaded.model, self.compiled[number])
        self._load_fit(student, number, [site.path for site in self.compiled[number].plan.rewritten])
        return student

    def _load_fit(self, student: nn.Module, number: int, paths: Sequence[str]) -> None:
        """Give some sites the weights of a candidate's fit.

        Raises:
            CheckpointError: it is damaged.
        """
        folder, own = self.folder.candidate(self.candidates[number]).path, tuple(f"{path}." for path in paths)
        index = read_index(folder)
        tensors = {name: tensor for name, tensor in read_tensors(folder, index).items() if name.startswith(own)}
        problem = student.load_state_dict(tensors, strict=False)
        strange = [*(name for name in problem.missing_keys if name.startswith(own)), *problem.unexpected_keys]
        if strange:
            raise CheckpointError(f"{folder} is not a fit of {self.candidates[number]}: {strange[0]}; remove it, and it is fitted again")

    def _context(self, student: nn.Module) -> Context:
        set_precision(student.eval(), set(trained_parameters(student, self.recipe.train)), self.recipe.precision)
        student.to(self.accelerator.device)
        called = call_as_recorded if self.recipe.data.recorded_calls else denoise
        schedule = noise_schedule(self.recipe, self.base)
        return Context(self.recipe, student, student, self.source, called, schedule, self.accelerator)

    # ------------------------------------------------------------------ all of them

    def _assembled(self) -> Ranking:
        """Put the measurements together."""
        folders = [self.folder.candidate(candidate) for candidate in self.candidates]
        first = folders[0].costs(self.size)
        assert first is not None
        timed = [times.total for folder in folders if self.time and (times := folder.times(self.size)) is not None]
        return Ranking(
            model=self.recipe.model,
            recipe=self.recipe.model_dump(mode="json"),
            candidates=self.candidates,
            size=self.size,
            image_tokens=first.image_tokens,
            text_tokens=first.text_tokens,
            flops=first.total,
            seconds=sorted(timed)[len(timed) // 2] if timed else None,
            samples=self.recipe.validation.samples,
            sites=tuple(self._ranked(path) for path in self._paths()),
        )

    def _paths(self) -> list[str]:
        """List the sites of the candidates' kinds, also those that none takes, in order of execution."""
        kinds, plans = {kind for candidate in self.candidates for kind in candidate.kinds}, [each.plan for each in self.compiled]
        return list(dict.fromkeys(site.path for plan in plans for site in plan if site.kind in kinds and site.path))

    def _ranked(self, path: str) -> RankedSite:
        measures = []
        for number, (candidate, taken) in enumerate(zip(self.candidates, self.taken, strict=True)):
            if path in taken:
                folder, site = self.folder.candidate(candidate), taken[path]
                error, bins = errors_of(folder.errors(), path)
                costs, times = folder.costs(self.size), folder.times(self.size) if self.time else None
                assert costs is not None
                numbers = {"error": error, "bins": bins, "saved_flops": costs.saved[path], "saved_seconds": times and times.saved[path]}
                measures.append(Measure.model_validate({"candidate": number, "design": site.action, "options": site.options, **numbers}))
        kept = dict.fromkeys(site.reason for each in self.compiled for site in each.plan if site.path == path and not site.rewritten)
        return RankedSite(path=path, measures=tuple(measures), reason="" if measures else "; ".join(kept))

    # ------------------------------------------------------------------ what was chosen

    def _checked(self, ranking: Ranking, budget: str, *, keep: bool) -> Ranking:
        """Convert what a budget chooses, as fitted, and measure it, unless that was done; with `keep` the student is saved."""
        selection, place = ranking.choose(budget), self.folder.chosen(budget)
        converted = {path: measure.candidate for path, measure in selection.converted.items()}
        same = next((check for check in ranking.checked if check.converted == converted), None)
        student = None if same is not None and not keep else self._converted(ranking, selection)
        if student is not None and keep:
            save(student, place, base=self.base)
        measured = same.measured if same is not None else self._error(student, budget)
        made = CheckedSet(sites=budget, converted=converted, flops=selection.flops, predicted=selection.error, measured=measured)
        others = [check for check in ranking.checked if check.sites != budget]
        return ranking.model_copy(update={"checked": tuple(sorted([*others, made], key=lambda check: (-check.flops, check.sites)))})

    def _error(self, student: nn.Module | None, budget: str) -> float:
        assert student is not None
        self.report(Progress(f"{budget}: all of its sites at once", 0, 1))
        return validate(self._context(student), self.phase.height, self.phase.width, self.phase.frames).total

    def _converted(self, ranking: Ranking, selection: Selection) -> nn.Module:
        """Convert the chosen sites, each with the weights of its candidate's fit."""
        numbers = {path: measure.candidate for path, measure in selection.converted.items()}
        student = install(self.loaded.model, self._compiled(ranking, selection, numbers))
        for number in sorted(set(numbers.values())):
            self._load_fit(student, number, [path for path in numbers if numbers[path] == number])
        return student

    def _compiled(self, ranking: Ranking, selection: Selection, numbers: Mapping[str, int]) -> CompiledPlan:
        """Put a plan together from those of the candidates, where they have one source of the grid; make it anew where not."""
        config = ranking.config_of(selection)
        used = [self.compiled[number] for number in sorted(set(numbers.values()))]
        if any(each.plan.grid != used[0].plan.grid for each in used):
            return plan_with_forwards(self.loaded, config)
        reasons = {site.path: rule.reason for site, rule in zip(ranking.sites, config.rules, strict=True)}

        def planned(site: SitePlan) -> SitePlan:
            if site.path not in numbers:
                return site.kept(reasons[site.path]) if site.rewritten else site
            chosen = self.taken[numbers[site.path]][site.path]
            return chosen.model_copy(update={"reason": f"{chosen.reason}; {reasons[site.path]}"})

        listed = [site for site in used[0].plan.sites if not site.rewritten or site.path in reasons]  # not what a design brings
        sites = tuple(planned(site) for site in listed)
        forwards = {path: self.compiled[number].forwards[path] for path, number in numbers.items()}
        return CompiledPlan(used[0].plan.model_copy(update={"sites": sites}), forwards)

    def _write(self, ranking: Ranking) -> None:
        write_text(self.folder.ranking, ranking.to_json())


def _measured_alike(one: Ranking, other: Ranking) -> bool:
    """Say whether two rankings are of the same fits: sizes and times may differ."""
    measures = [[(site.path, [measure.error for measure in site.measures]) for site in each.sites] for each in (one, other)]
    return (one.candidates, one.samples, measures[0]) == (other.candidates, other.samples, measures[1])


def _default_budgets(ranking: Ranking) -> list[str]:
    """Spell budgets of FLOPs from a part of what can be saved to all of it."""
    most = sum(max(measure.saved_flops for measure in site.measures) for site in ranking.sites if site.path in ranking.choices.ranks)
    shares = [1 - Fraction(most * number, ranking.flops * _CHECKS) for number in range(1, _CHECKS + 1)]
    return [f"flops <= {ceil(share * 1000) / 1000:g}x" for share in shares if most and ceil(share * 1000) < 1000]
