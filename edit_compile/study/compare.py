"""Comparisons: of the cells of a study, which are done here, or of runs that are there already."""

from __future__ import annotations

import gc
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edit_compile.adapters.model_names import is_on_hub, without_address
from edit_compile.bench.machine import Machine, machine_in_words
from edit_compile.distillation.models import Student, make_student
from edit_compile.distillation.output.run_folder import RunFolder
from edit_compile.distillation.recipe.load import load_recipe
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.distillation.run import distill
from edit_compile.errors import CheckpointError, EditCompileError, Interrupted, StudyError
from edit_compile.files import claimed, write_text
from edit_compile.frozen import first_problem
from edit_compile.progress import each
from edit_compile.report.image_grid import image_grid, save_image
from edit_compile.student.checkpoint import base_of, load
from edit_compile.student.checkpoint_format import read_index
from edit_compile.student.fingerprint import difference
from edit_compile.student.hub import find_checkpoint, run_folder
from edit_compile.study.budget import as_cell, timings, with_seconds, with_steps
from edit_compile.study.cells import Cell, CellFolder
from edit_compile.study.drawn import Drawn, gallery_columns
from edit_compile.study.load import find_study, load_study, resolve
from edit_compile.study.measure import Measurer, Subject, last_size
from edit_compile.study.measured import Measurements, identity_of_run, read_measured
from edit_compile.study.results import CellResult, ModelRow, Results, markdown, row_of
from edit_compile.study.schema import Latency, Measures, Size, Study
from edit_compile.words import duration_in_words

RESULTS, MARKDOWN, GALLERY = "results.json", "results.md", "gallery.png"


@dataclass(frozen=True)
class Request:
    """What is to be compared, as users ask for it.

    Attributes:
        paths: one study, a YAML file or a shipped study's name; or runs that `distill` has finished: their folders, or the hub ids of
            repositories that they were uploaded to.
        output: the folder to write; default: `runs/` and the study's name, or `runs/comparison`.
        only: of a study, names of configurations; the others' cells are not begun.
        samples: of runs, how many held-out captions a demo model draws. Default: as for studies.
        latency: of runs, sizes at which the time of a forward is measured.
        modules: what the command line imported before.
    """

    paths: Sequence[str | Path]
    output: str | Path | None = None
    only: Sequence[str] = ()
    samples: int | None = None
    latency: Sequence[Size] = ()
    modules: Sequence[str] = ()

    @property
    def of_study(self) -> bool:
        """Whether it is a study that is asked for."""
        first = without_address(str(self.paths[0]))
        return len(self.paths) == 1 and not Path(first).is_dir() and (first.endswith((".yaml", ".yml")) or not is_on_hub(first))

    @property
    def folder(self) -> Path:
        """The folder to write."""
        if self.output is not None:
            return Path(self.output)
        return Path("runs") / (find_study(self.paths[0]).stem if self.of_study else "comparison")

    @property
    def command(self) -> str:
        """The command that does the same, with all of its options."""
        options = [part for name in self.only for part in ("--only", name)]
        options += [] if self.samples is None else ["--samples", str(self.samples)]
        options += [part for size in self.latency for part in ("--latency", "x".join(map(str, size)))]
        imports = [part for module in self.modules for part in ("--import", module)]
        return shlex.join(["edit-compile", *imports, "compare", *map(str, self.paths), *options, "-o", str(self.folder)])

    def run(self, say: Callable[[str], None]) -> Results:
        """Do it, as of `compare`."""
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise StudyError("a comparison is not for a launcher of several processes: start it as often as wanted, they share the cells")
        if self.of_study:
            if self.samples is not None or self.latency:
                raise StudyError("samples and latency are for runs: a study's own measure.samples and latency say it")
            file = find_study(self.paths[0])
            return StudyRun(load_study(file), file, self, say).run()
        if self.only:
            raise StudyError("only: it selects configurations of a study, not runs")
        return RunComparison([run_folder(path, self.folder / "downloads") for path in self.paths], self, say).run()


def compare(
    *paths: str | Path,
    output: str | Path | None = None,
    only: Sequence[str] = (),
    samples: int | None = None,
    latency: Sequence[Size] = (),
    say: Callable[[str], None] | None = None,
) -> Results:
    """Compare ways to convert and distil a model: by a study, whose cells are done unless they are there, or by finished runs.

    Args:
        paths, output, only, samples, latency: as of `Request`.
        say: is told what is being done.

    Raises:
        StudyError: the study is wrong, its folder holds other cells, or the runs cannot be compared.
        Interrupted: SIGINT or SIGTERM arrived while a cell trained; comparing again resumes.
    """
    request = Request(paths, output, only, samples, latency)
    return request.run(say or (lambda line: None))


def read_results(folder: Path) -> Results:
    """Read what a comparison found.

    Raises:
        StudyError: there is nothing, or another version of this package wrote it.
    """
    path = folder / RESULTS
    try:
        return Results.model_validate_json(path.read_bytes())
    except OSError:
        raise StudyError(f"{folder} has no {RESULTS}: nothing was compared there") from None
    except ValidationError as error:
        raise StudyError(f"{path} cannot be read by this version: {first_problem(error)}; compare again") from None


@dataclass
class StudyRun:
    """A study in its folder."""

    study: Study
    file: Path
    request: Request
    say: Callable[[str], None]

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return self.request.folder

    def run(self) -> Results:
        """Do all cells that are not done, and write the results after each."""
        only = self.request.only
        unknown = [name for name in only if name not in self.study.configurations]
        if unknown:
            raise StudyError(f"{self.file}: no configuration {unknown[0]!r}; there are: {', '.join(self.study.configurations)}")
        wanted = [name for name in self.study.configurations if not only or name in only]
        if self.folder.exists() and not self.folder.is_dir():
            raise StudyError(f"{self.folder} is a file; a study needs a folder: choose another with -o")
        cells = self._cells(wanted)
        for cell in cells:
            cell.check()
        self._copy_study()
        self.say(f"{len(cells)} cells in {self.folder}")
        self.measurer.measure_teacher()
        titles = {cell.title: f"[{number + 1}/{len(cells)}] {cell.title}" for number, cell in enumerate(cells)}
        busy = [cell for cell in each(cells, "cells", len(cells)) if not self._do(cell, titles[cell.title])]
        busy = [cell for cell in busy if not self._do(cell, titles[cell.title])]  # another process may have been killed
        for cell in {cell.name: cell for cell in reversed(cells)}.values():  # of each configuration the first
            if cell.name in self.study.untrained_names:
                self._measure_untrained(cell, [other.folder for other in cells if other.name == cell.name])
        if busy:
            self.say(f"left to other processes: {', '.join(cell.title for cell in busy)}; compare again when they are done")
        return self.write()

    def write(self) -> Results:
        """Put together what there is, and write `results.json`, `results.md` and `gallery.png`."""
        measurer = self.measurer
        with self._alone("results"):
            results = Results(
                command=replace(self.request, only=()).command,
                model=self._base,
                budget=_budget(self.study),
                seeds=self.study.seeds,
                samples=self.study.measure.samples if measurer.is_demo else 0,
                machine=Machine.this(),
                rows=tuple(self._rows()),
            )
            teacher = Drawn.read(measurer.teacher, measurer.teacher_identity)
            drawn = [("teacher", teacher), *((name, self._drawn(name)) for name in self.study.configurations)]
            write_results(results, self.folder, drawn, self.study.measure.gallery)
        return results

    def _copy_study(self) -> None:
        """Keep the study beside its cells."""
        copy, text = self.folder / "study.yaml", self.file.read_text("utf-8")
        with self._alone("results"):  # another process may begin at the same time
            if not copy.exists() or copy.read_text("utf-8") != text:
                write_text(copy, text)

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Wait for other processes that do the same, and keep them out.

        Raises:
            StudyError: the folder cannot be written.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(claimed(self._lock(name), wait=True))
            except OSError as error:
                raise StudyError(f"{self.folder} cannot be written: {error.strerror}; choose another folder with -o") from None
            yield

    def _lock(self, name: str) -> Path:
        return self.folder / "locks" / name

    def _cells(self, names: Sequence[str]) -> list[Cell]:
        """List the cells, seed by seed, so that a study that was stopped has something of every configuration."""
        seeds, budget = self.study.seeds, self.study.budget
        recipes = {(name, seed): self._recipe(name, seed) for name in names for seed in seeds}
        if budget is not None and budget.steps is not None:
            recipes = {key: with_steps(recipe, budget.steps) for key, recipe in recipes.items()}
        elif budget is not None and budget.seconds is not None:
            recipes = self._of_equal_seconds(recipes, budget.seconds)
        order = [(name, seed) for seed in seeds for name in names if (name, seed) in recipes]
        cells = [(self._cell(*key), as_cell(recipes[key])) for key in order]
        return [Cell(cell.name, cell.seed, cell.folder, cell.wanted, recipe) for cell, recipe in cells]

    def _of_equal_seconds(self, recipes: dict[tuple[str, int], Recipe], seconds: float) -> dict[tuple[str, int], Recipe]:
        """Give recipes the steps that take so many seconds; the cells of those whose short runs fail have failed, and are left out."""
        all_recipes = {name: self._recipe(name, self.study.seeds[0]) for name in self.study.configurations}
        with self._alone("timing"):
            timed = timings(all_recipes, self.folder / "timing", machine_in_words())
        for name, seed in recipes:
            if name in timed.failed:
                self.say(f"{name}, seed {seed}: failed as its steps were timed: {self._cell(name, seed).fail(timed.failed[name])}")
        return {key: with_seconds(recipe, seconds, timed.found[key[0]]) for key, recipe in recipes.items() if key[0] in timed.found}

    def _recipe(self, name: str, seed: int) -> Recipe:
        return resolve(self.study, self.file, name, seed)

    def _cell(self, name: str, seed: int) -> CellFolder:
        draws = seed == self.study.seeds[0]
        return CellFolder(name, seed, self.folder / "cells" / name / f"seed-{seed}", self.measurer.wanted(draws=draws))

    @cached_property
    def measurer(self) -> Measurer:
        """What measures the models, as the first configuration says."""
        recipe, sizes = self._recipe(next(iter(self.study.configurations)), self.study.seeds[0]), self.study.measure.flops
        return Measurer(
            base=self._base,
            recipe=recipe,
            measures=self.study.measure,
            latency=self.study.latency,
            sizes=(last_size(recipe),) if sizes is None else sizes,
            teacher=self.folder / "teacher",
            lock=self._lock("teacher"),
        )

    @cached_property
    def _base(self) -> str:
        model = self._recipe(next(iter(self.study.configurations)), self.study.seeds[0]).model
        return (base_of(model) if find_checkpoint(model) is not None else None) or model

    def _do(self, cell: Cell, title: str) -> bool:
        """Train and measure a cell, unless that was done; returns whether it is not in another process's hands."""
        with claimed(self._lock(f"{cell.name}, {cell.seed}")) as mine:
            if not mine:
                return False
            before = (cell.state(), cell.measured())
            changes = cell.begin()
            if changes:
                self.say(f"{title}: had failed, and was changed: {changes}; begins anew")
            try:
                load = self._train(cell, title)
                alike = [self._cell(cell.name, seed).folder for seed in self.study.seeds if seed != cell.seed]
                self.measurer.measure(Subject(cell.folder, cell.model, load, alike, draws=cell.seed == self.study.seeds[0]))
            except Interrupted:
                raise
            except Exception as error:  # one cell must not end the night for the others
                self.say(f"{title} failed: {cell.fail(error)}")
            gc.collect()
            if (cell.state(), cell.measured()) != before:
                self.write()
        return True

    def _train(self, cell: Cell, title: str) -> Callable[[], Student]:
        """Train a cell unless that was done; returns what loads its student."""
        if cell.run.result.exists():
            return lambda: loaded(cell.folder)
        self.say(f"{title}: training")
        result = distill(cell.recipe, cell.folder, resume=True)
        self.say(f"{title}: error {result.before.total:.3g} -> {result.after.total:.3g}, {duration_in_words(result.seconds)}; measuring")
        return lambda: Student(result.student, base_of(cell.folder))

    def _measure_untrained(self, cell: Cell, trained: Sequence[Path]) -> None:
        with claimed(self._lock(f"{cell.name}, untrained")) as mine:
            if mine:
                identity = self.measurer.untrained_identity(cell.recipe)
                alike = trained if cell.recipe.train != "lora" else ()  # which is in the trained ones only
                subject = Subject(self.folder / "untrained" / cell.name, identity, lambda: make_student(cell.recipe), alike)
                try:
                    self.measurer.measure(subject)
                except (EditCompileError, RuntimeError, OSError) as error:
                    self.say(f"{cell.name}, untrained: not measured: {error}")

    def _rows(self) -> Iterator[ModelRow]:
        rows = [self._row(name) for name in self.study.configurations]
        yield teacher_row(self.measurer.of_teacher(), rows)
        for row in rows:
            if row.name in self.study.untrained_names:
                yield self._untrained_row(row)
            yield row

    def _row(self, name: str) -> ModelRow:
        cells = []
        for cell in (self._cell(name, seed) for seed in self.study.seeds):
            failure, place = cell.failure(), cell.folder.relative_to(self.folder).as_posix()
            result = CellResult(seed=cell.seed, folder=place, state=cell.state(), error=failure.error if failure is not None else None)
            cells.append((result, cell.measured().only(cell.wanted)))
        return row_of(name, "distilled", cells)

    def _untrained_row(self, trained: ModelRow) -> ModelRow:
        """Make the row of a converted model before training; its error was measured when each cell began."""
        folder, measurer = self.folder / "untrained" / trained.name, self.measurer
        identity = measurer.untrained_identity(self._recipe(trained.name, self.study.seeds[0]))
        measured = read_measured(folder, identity).only(measurer.wanted())
        row = row_of(trained.name, "untrained", [(CellResult(seed=None, folder=folder.name, state="finished"), measured)])
        before = {"error.after": trained.numbers["error.before"]} if "error.before" in trained.numbers and row.numbers else {}
        return row.model_copy(update={"numbers": {**row.numbers, **before}})

    def _drawn(self, name: str) -> Drawn | None:
        """Return what the first seed's student drew, or the next one's."""
        cells = (self._cell(name, seed) for seed in self.study.seeds)
        found = (Drawn.read(cell.folder, cell.model) for cell in cells)
        return next((drawn for drawn in found if drawn is not None), None)


@dataclass
class RunComparison:
    """A comparison of finished runs."""

    runs: list[Path]
    request: Request
    say: Callable[[str], None]

    def run(self) -> Results:
        """Measure what is missing, beside each run's own files, and write the results."""
        self._check()
        names, folder = _short_names(self.runs), self.request.folder
        samples, sizes = self.request.samples, self.request.latency
        recipe = load_recipe(self.runs[0] / "recipe.yaml")
        measurer = Measurer(
            base=base_of(self.runs[0]) or recipe.model,
            recipe=recipe,
            measures=Measures() if samples is None else Measures(samples=samples),
            latency=Latency(sizes=tuple(sizes)) if sizes else None,
            sizes=(last_size(recipe),),
            teacher=folder / "teacher",
            lock=folder / "locks" / "teacher",
        )
        measurer.measure_teacher()
        rows = [self._row(name, run, measurer) for name, run in zip(names, self.runs, strict=True)]
        results = Results(
            command=self.request.command,
            model=measurer.base,
            budget="as each run's recipe says",
            seeds=(),
            samples=measurer.measures.samples if measurer.is_demo else 0,
            machine=Machine.this(),
            rows=(teacher_row(measurer.of_teacher(), rows), *rows),
        )
        teacher = Drawn.read(measurer.teacher, measurer.teacher_identity)
        drawn = [(name, Drawn.read(run, identity_of_run(run))) for name, run in zip(names, self.runs, strict=True)]
        with claimed(folder / "locks" / "results", wait=True):
            write_results(results, folder, [("teacher", teacher), *drawn], measurer.measures.gallery)
        return results

    def _row(self, name: str, run: Path, measurer: Measurer) -> ModelRow:
        """Measure what is missing of a run; if that fails, its row says why."""
        self.say(f"{name}: measuring what is missing")
        identity, failed = identity_of_run(run), None
        try:
            with claimed(run / ".measuring", wait=True):
                measured = measurer.measure(Subject(run, identity, partial(loaded, run)))
        except (EditCompileError, RuntimeError) as error:
            failed = str(error)
        except OSError as error:
            raise StudyError(f"{run}: what is measured cannot be written beside the run's own files: {error}") from error
        if failed is not None:
            self.say(f"{name} failed: {failed}")
            measured = read_measured(run, identity)
        gc.collect()
        cell = CellResult(seed=None, folder=str(run), state="finished" if failed is None else "failed", error=failed)
        return row_of(name, "distilled", [(cell, measured.only(measurer.wanted()))])

    def _check(self) -> None:
        """Make sure that all are finished runs of one base model.

        Raises:
            StudyError: one is not; says which, and why.
        """
        first = None
        for run in self.runs:
            for file in ("recipe.yaml", RunFolder(run).result.name):
                if not (run / file).is_file():
                    raise StudyError(f"{run} is not the folder of a finished run: it has no {file}")
            try:
                index = read_index(run)
            except CheckpointError as error:
                raise StudyError(f"{run} is not the folder of a finished run: {error}") from None
            first = first or index
            differs = difference(first.fingerprint, index.fingerprint)
            if differs:
                raise StudyError(f"{run} was made from another model than {self.runs[0]}: {differs}; compare runs of one model")


def loaded(folder: Path) -> Student:
    """Load the student of a run's folder."""
    return Student(load(folder), base_of(folder))


def write_results(results: Results, folder: Path, drawn: Sequence[tuple[str, Drawn | None]], rows: int) -> None:
    """Write `gallery.png`, `results.md` and `results.json`, each at once; without anything to show there is no gallery."""
    folder.mkdir(parents=True, exist_ok=True)
    captions, images = gallery_columns(drawn, rows)
    if captions:
        save_image(image_grid(captions, images), folder / GALLERY)
    else:
        (folder / GALLERY).unlink(missing_ok=True)
    write_text(folder / MARKDOWN, markdown(results, GALLERY if captions else None))
    write_text(folder / RESULTS, results.model_dump_json(indent=2))


def written(folder: Path) -> list[str]:
    """List the files that there are of a comparison."""
    return [name for name in (RESULTS, MARKDOWN, GALLERY) if (folder / name).is_file()]


def teacher_row(measured: Measurements, rows: Sequence[ModelRow]) -> ModelRow:
    """Make the teacher's row; its FLOPs were counted with any of the others."""
    cell = CellResult(seed=None, folder="teacher", state="finished")
    row = row_of("teacher", "teacher", [(cell, measured)])
    counted: dict[str, Any] = {}
    for other in rows:
        for name, spread in other.numbers.items():
            if name.startswith("flops.") and name.endswith(".teacher"):
                counted.setdefault(name.removesuffix(".teacher"), spread)
    return row.model_copy(update={"numbers": {**row.numbers, **counted}})


def _short_names(runs: Sequence[Path]) -> list[str]:
    """Name each run by the end of its path, as much of it as tells them apart."""
    parts = [run.resolve().parts for run in runs]
    count = next((count for count in range(1, max(map(len, parts)) + 1) if len({part[-count:] for part in parts}) == len(parts)), None)
    if count is None:
        raise StudyError("a run is given twice")
    return ["/".join(part[-count:]) for part in parts]


def _budget(study: Study) -> str:
    if study.budget is None:
        return "as each recipe says"
    if study.budget.steps is not None:
        return f"{study.budget.steps:,} steps"
    return f"{study.budget.seconds:g} s of training"
