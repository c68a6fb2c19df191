"""Ranking a model's sites: fit every candidate, measure every site, choose, and measure what was chosen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edit_compile.adapters.family import Extent
from edit_compile.adapters.model_names import hub_id
from edit_compile.bench import video_size
from edit_compile.bench.machine import machine_in_words
from edit_compile.designs import KEEP
from edit_compile.distillation.models import check_frames_of
from edit_compile.distillation.ranking.budget import parse_budget
from edit_compile.distillation.ranking.folder import CandidateFolder, RankingFolder, Times
from edit_compile.distillation.ranking.measure import count_costs, errors_of, fit, inputs_at, measure_errors, measure_times
from edit_compile.distillation.ranking.plot import plot_ranking
from edit_compile.distillation.ranking.ranking import DesignCandidate, Measure, RankedSite, Ranking, parse_candidates
from edit_compile.distillation.ranking.sets import Sets
from edit_compile.distillation.ranking.subject import RankedModel
from edit_compile.distillation.ranking.tables import markdown
from edit_compile.distillation.recipe.load import load_recipe
from edit_compile.distillation.recipe.names import model_of, shipped_recipes
from edit_compile.distillation.recipe.schedule import phases_of
from edit_compile.distillation.recipe.schema import LayerwiseFit, Recipe, SampleGrids
from edit_compile.distillation.train.interrupt import Interrupt, interruptible
from edit_compile.errors import ConfigError, DistillError, Interrupted, NoExampleInputsError
from edit_compile.files import alone_in, write_text
from edit_compile.ir.plan import SiteKind
from edit_compile.progress import working
from edit_compile.student.fingerprint import fingerprint

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

    Raises:
        ConfigError, RecipeError: a candidate, a budget or the recipe is wrong, or a candidate takes no site.
        DistillError: the data cannot be opened, or the folder has another ranking.
        Interrupted: SIGINT or SIGTERM arrived; the same call continues.
    """
    for budget in sites:
        parse_budget(budget)
    settled = ranking_recipe(model, recipe, steps)
    competing = parse_candidates(list(candidates)) if candidates is not None else _candidates_of(settled)
    folder, last = RankingFolder(ranking_folder(model, output)), phases_of(settled)[-1]
    ranked = RankedModel(settled, competing, folder)
    ranker = Ranker(ranked, size or video_size(last.height, last.width, last.frames), time)
    with alone_in(folder.path, "ranks in", DistillError), interruptible() as interrupt:
        return ranker.run(sites, interrupt)


def ranking_folder(model: str, output: str | Path | None = None) -> Path:
    """Return the folder that `rank` writes."""
    return Path(output) if output is not None else Path("rankings") / Path(model).resolve().name


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
    found = [name for name in shipped_recipes() if hub_id(model_of(name))[0] == hub_id(model)[0]]
    if len(found) != 1:
        problem = f"{' and '.join(found)} are for {model}" if found else f"no shipped recipe is for {model}"
        raise ConfigError(f"{problem}: name one with --recipe (recipe=); it says which data to measure on")
    return found[0]


def _candidates_of(recipe: Recipe) -> tuple[DesignCandidate, ...]:
    """Return the designs that a recipe converts with, as candidates: its one design, or those of its rules."""
    if not recipe.convert.rules:
        return (DesignCandidate(design=recipe.convert.design, options=recipe.convert.options),)
    found = [DesignCandidate(design=rule.design, options=rule.options) for rule in recipe.convert.rules if rule.design != KEEP]
    if not found:
        raise ConfigError("the recipe's rules keep all sites: name designs that compete with --candidates (candidates=)")
    return tuple(each for number, each in enumerate(found) if each not in found[:number])


@dataclass
class Ranker:
    """One ranking.

    Attributes:
        size: in pixels, at which FLOPs are counted.
        time: whether to measure times.
    """

    model: RankedModel
    size: Extent
    time: bool

    @property
    def folder(self) -> RankingFolder:
        """Where everything is written."""
        return self.model.folder

    def run(self, sites: Sequence[str], interrupt: Interrupt) -> Ranking:
        """Measure what is not measured yet, and write the folder.

        Raises:
            Interrupted, DistillError, ConfigError: as `rank`.
        """
        model, loaded = self.model, self.model.loaded.model
        with working("reading the weights' fingerprint"):
            weights = json.dumps({name: [each.shape, each.values] for name, each in fingerprint(loaded.state_dict()).items()})
        self.folder.open(model.recipe, hashlib.sha256(weights.encode()).hexdigest())
        check_frames_of(model.recipe, loaded)
        self._prepare(sites)
        for number, candidate in enumerate(model.candidates):
            with working(f"{candidate} ({number + 1} of {len(model.candidates)})" if len(model.candidates) > 1 else str(candidate)):
                self._measure(number, interrupt)
        ranking = self._assembled()
        for text in sites:
            ranking.choose(text)  # whatever is wrong with one is told before the first is converted
        for path in (self.folder.page, self.folder.plot):
            path.unlink(missing_ok=True)  # they may be of another size
        write_text(self.folder.ranking, ranking.to_json())
        ranking = self._with_checked_sets(ranking, [parse_budget(text).text for text in sites], interrupt)
        write_text(self.folder.ranking, ranking.to_json())
        plot_ranking(ranking, self.folder.plot)
        write_text(self.folder.page, markdown(ranking))
        return ranking

    # ------------------------------------------------------------------ before anything takes long

    def _prepare(self, sites: Sequence[str]) -> None:
        """Count what every candidate saves, and find out what would fail after the fits.

        Raises:
            ConfigError: a budget cannot be reached, or times cannot be measured.
            DistillError: a fit in the folder is of another plan.
        """
        model = self.model
        for number, compiled in enumerate(model.compiled):
            folder = model.candidate_folder(number)
            if folder.fitted:
                folder.check(compiled.plan)
            if not folder.fitted or folder.costs(self.size) is None:  # of an unfinished fit the plan is not known
                folder.write(count_costs(model.converted(number), self.size, list(model.taken[number]), model.loaded.pipeline), self.size)
        if self.time:
            try:
                inputs_at(model.loaded.model, self.size)
            except NoExampleInputsError as error:
                raise ConfigError(f"--time (time=) cannot be measured: {error}") from None
        without_errors = self._assembled(measured=False)
        for text in sites:
            quantity = parse_budget(text).quantity
            if quantity != "error" and not (quantity == "time" and self.time):
                without_errors.choose(text)

    # ------------------------------------------------------------------ one candidate

    def _measure(self, number: int, interrupt: Interrupt) -> None:
        model, phase = self.model, self.model.phase
        candidate, paths, folder = model.candidates[number], list(model.taken[number]), model.candidate_folder(number)
        fitted = cache(lambda: model.fitted(number))
        if not folder.fitted:
            fit(model.context(model.converted(number)), phase, folder, model.base, interrupt)
        if folder.errors().batches * model.recipe.validation.batch_size < model.recipe.validation.samples:
            measure_errors(model.context(fitted()), phase, paths, folder, interrupt, str(candidate))
        if self.time and self._times_here(folder) is None:
            folder.write(measure_times(fitted(), self.size, paths), self.size)

    def _times_here(self, folder: CandidateFolder) -> Times | None:
        """Return the times that were measured on this machine."""
        times = folder.times(self.size)
        return times if times is not None and times.machine == machine_in_words() else None

    # ------------------------------------------------------------------ all of them

    def _assembled(self, *, measured: bool = True) -> Ranking:
        """Put the measurements together; without errors, all are 0."""
        model, times = self.model, self._times()
        first = model.candidate_folder(0).costs(self.size)
        assert first is not None
        totals = sorted(each.total for each in times or ())
        return Ranking(
            model=model.recipe.model,
            recipe=model.recipe.model_dump(mode="json"),
            candidates=model.candidates,
            size=self.size,
            image_tokens=first.image_tokens,
            text_tokens=first.text_tokens,
            flops=first.total,
            seconds=totals[len(totals) // 2] if totals else None,
            samples=model.recipe.validation.samples,
            sites=tuple(self._ranked(path, kind, times, measured=measured) for path, kind in model.sites.items()),
        )

    def _times(self) -> list[Times] | None:
        """Return every candidate's times, if all were measured on one machine."""
        found = [self.model.candidate_folder(number).times(self.size) for number in range(len(self.model.candidates))]
        times = [each for each in found if each is not None]
        return times if len(times) == len(found) and len({each.machine for each in times}) == 1 else None

    def _ranked(self, path: str, kind: SiteKind, times: list[Times] | None, *, measured: bool) -> RankedSite:
        measures, model = [], self.model
        for number, taken in enumerate(model.taken):
            if path in taken:
                folder, site = model.candidate_folder(number), taken[path]
                error, bins = errors_of(folder.errors(), path) if measured else (0.0, ())
                costs = folder.costs(self.size)
                assert costs is not None
                made = Measure(
                    candidate=number,
                    design=site.action,
                    options=site.options,
                    error=error,
                    bins=bins,
                    saved_flops=costs.saved[path],
                    saved_seconds=None if times is None else times[number].saved[path],
                )
                measures.append(made)
        kept = dict.fromkeys(site.reason for each in model.compiled for site in each.plan if site.path == path and not site.rewritten)
        return RankedSite(path=path, kind=kind, measures=tuple(measures), reason="" if measures else "; ".join(kept))

    # ------------------------------------------------------------------ what was chosen

    def _with_checked_sets(self, ranking: Ranking, asked: Sequence[str], interrupt: Interrupt) -> Ranking:
        """Convert what budgets choose, and measure it: of FLOPs from a part of what can be saved to all of it, and what was asked for."""
        sets, checked = Sets(self.model), []
        for budget in dict.fromkeys([*ranking.choices.budgets(_CHECKS), *asked]):
            if interrupt.requested:
                raise Interrupted("stopped before all chosen sets were converted and measured")
            checked.append(sets.checked(ranking, budget, keep=budget in asked))
        return ranking.model_copy(update={"checked": tuple(sorted(checked, key=lambda check: (-check.flops, check.sites)))})
