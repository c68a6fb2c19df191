"""Comparisons: of the cells of a study, which are done here, or of runs that are there already."""

from __future__ import annotations

import gc
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edit_compile.bench import video_size
from edit_compile.demo import models as demo
from edit_compile.distillation.models import Student, make_student
from edit_compile.distillation.output.run_folder import RunFolder
from edit_compile.distillation.recipe.load import load_recipe
from edit_compile.distillation.recipe.schedule import phases_of
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.distillation.run import distill
from edit_compile.distillation.train.metrics import MetricsRow
from edit_compile.errors import CheckpointError, EditCompileError, Interrupted, StudyError
from edit_compile.files import write_text
from edit_compile.frozen import first_problem
from edit_compile.report.image_grid import image_grid, save_image
from edit_compile.student.checkpoint import INDEX, base_of, load
from edit_compile.student.checkpoint_format import read_index
from edit_compile.student.fingerprint import difference
from edit_compile.study.budget import as_cell, timings, with_seconds, with_steps
from edit_compile.study.cells import Cell, CellFolder, claimed
from edit_compile.study.drawn import Drawn, gallery_columns
from edit_compile.study.load import find_study, load_study, resolve
from edit_compile.study.measure import Measurer, Subject
from edit_compile.study.measured import Measured, read_measured
from edit_compile.study.results import CellResult, Machine, Results, Row, markdown, row_of
from edit_compile.study.schema import Latency, Measures, Study

RESULTS, MARKDOWN, GALLERY = "results.json", "results.md", "gallery.png"
# Shows a run's progress: given the cell's title and its recipe, yields a callback for rows of metrics.
Progress = Callable[[str, Recipe], AbstractContextManager[Callable[[MetricsRow], None]]]


def compare(
    *paths: str | Path,
    output: str | Path | None = None,
    only: Sequence[str] = (),
    samples: int | None = None,
    say: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Results:
    """Compare ways to convert and distil a model: by a study, whose cells are done unless they are there, or by finished runs.

    Args:
        paths: one study, a YAML file or a shipped study's name; or the folders of runs that `distill` has finished.
        output: the folder to write; default: `runs/` and the study's name, or `runs/comparison`.
        only: names of configurations; the others' cells are not begun.
        samples: of runs: how many held-out captions a demo model draws.
        say: is told what is being done.
        progress: shows the progress of a training.

    Raises:
        StudyError: the study is wrong, its folder holds other cells, or the runs cannot be compared.
        Interrupted: SIGINT or SIGTERM arrived while a cell trained; comparing again resumes.
    """
    say = say or (lambda line: None)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise StudyError("a comparison is not for a launcher of several processes: start it as often as wanted, they share the cells")
    if len(paths) == 1 and not Path(paths[0]).is_dir():
        file = find_study(paths[0])
        folder = Path(output) if output is not None else Path("runs") / file.stem
        return StudyRun(load_study(file), file, folder, say, progress or (lambda title, recipe: nullcontext(lambda row: None))).run(only)
    if only:
        raise StudyError("only: it selects configurations of a study, not runs")
    measures = Measures() if samples is None else Measures(samples=samples)
    return RunComparison([Path(path) for path in paths], Path(output or "runs/comparison"), measures, say).run()


def read_results(folder: Path) -> Results:
    """Read what a comparison found.

    Raises:
        StudyError: there is nothing, or another version of this package wrote it.
    """
    path = folder / RESULTS
    try:
        return Results.model_validate_json(path.read_text())
    except OSError:
        raise StudyError(f"{folder} has no {RESULTS}: nothing was compared there") from None
    except ValidationError as error:
        raise StudyError(f"{path} cannot be read by this version: {first_problem(error)}; compare again") from None


def output_of(paths: Sequence[str | Path], output: str | Path | None) -> Path:
    """Return the folder that `compare` writes."""
    if output is not None:
        return Path(output)
    return Path("runs") / (find_study(paths[0]).stem if len(paths) == 1 and not Path(paths[0]).is_dir() else "comparison")


@dataclass
class StudyRun:
    """A study in its folder."""

    study: Study
    file: Path
    folder: Path
    say: Callable[[str], None]
    progress: Progress

    def run(self, only: Sequence[str]) -> Results:
        """Do all cells that are not done, and write the results after each."""
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
        measurer = self._measurer(cells[0])
        self.say(f"{len(cells)} cells in {self.folder}")
        measurer.measure_teacher()
        titles = {cell.title: f"[{number + 1}/{len(cells)}] {cell.title}" for number, cell in enumerate(cells)}
        busy = [cell for cell in cells if not self._do(cell, measurer, titles[cell.title])]
        busy = [cell for cell in busy if not self._do(cell, measurer, titles[cell.title])]  # another process may have been killed
        for name in wanted:
            if name in self.study.untrained_names:
                self._measure_untrained(name, cells, measurer)
        if busy:
            self.say(f"left to other processes: {', '.join(cell.title for cell in busy)}; compare again when they are done")
        return self.write()

    def write(self) -> Results:
        """Put together what there is, and write `results.json`, `results.md` and `gallery.png`."""
        with claimed(self.folder / "locks" / "results", wait=True):
            results = Results(
                command=shlex.join(["edit-compile", "compare", str(self.file), "-o", str(self.folder)]),
                model=self._base,
                budget=_budget(self.study),
                seeds=self.study.seeds,
                samples=self.study.measure.samples if self._is_demo else 0,
                machine=Machine.this(),
                rows=tuple(self._rows()),
            )
            drawn = [("teacher", Drawn.read(self.folder / "teacher")), *((name, self._drawn(name)) for name in self.study.configurations)]
            write_results(results, self.folder, drawn, self.study.measure.gallery)
        return results

    def _copy_study(self) -> None:
        copy = self.folder / "study.yaml"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with claimed(self.folder / "locks" / "results", wait=True):  # another process may begin at the same time
                if self.file.resolve() != copy.resolve():
                    write_text(copy, self.file.read_text())
        except OSError as error:
            raise StudyError(f"{self.folder} cannot be written: {error.strerror}; choose another folder with -o") from None

    def _cells(self, names: Sequence[str]) -> list[Cell]:
        """List the cells, seed by seed, so that a study that was stopped has something of every configuration."""
        recipes = {(name, seed): resolve(self.study, self.file, name, seed) for name in names for seed in self.study.seeds}
        budget = self.study.budget
        if budget is not None and budget.steps is not None:
            recipes = {key: with_steps(recipe, budget.steps) for key, recipe in recipes.items()}
        elif budget is not None and budget.seconds is not None:
            with claimed(self.folder / "locks" / "timing", wait=True):
                timed = timings({name: recipes[name, self.study.seeds[0]] for name in names}, self.folder / "timing")
            recipes = {key: with_seconds(recipe, budget.seconds, timed[key[0]]) for key, recipe in recipes.items()}
        return [Cell(name, seed, self._place(name, seed), as_cell(recipes[name, seed])) for seed in self.study.seeds for name in names]

    def _place(self, name: str, seed: int) -> Path:
        return self.folder / "cells" / name / f"seed-{seed}"

    def _measurer(self, cell: Cell) -> Measurer:
        sizes = self.study.measure.flops
        return Measurer(
            base=self._base,
            recipe=cell.recipe,
            measures=self.study.measure,
            latency=self.study.latency,
            sizes=_last_size(cell.recipe) if sizes is None else sizes,
            teacher=self.folder / "teacher",
            lock=self.folder / "locks" / "teacher",
        )

    @property
    def _base(self) -> str:
        model = resolve(self.study, self.file, next(iter(self.study.configurations)), self.study.seeds[0]).model
        return (base_of(model) if (Path(model) / INDEX).is_file() else None) or model

    @property
    def _is_demo(self) -> bool:
        return self._base in demo.SOURCES

    def _do(self, cell: Cell, measurer: Measurer, title: str) -> bool:
        """Train and measure a cell, unless that was done; returns whether it is not in another process's hands."""
        with claimed(self.folder / "locks" / f"{cell.name}, {cell.seed}") as mine:
            if not mine:
                return False
            before = (cell.state(), read_measured(cell.folder))
            cell.begin()
            try:
                model = self._train(cell, title)
                alike = [self._place(cell.name, seed) for seed in self.study.seeds if seed != cell.seed]
                measurer.measure(Subject(cell.folder, model, alike, draws=cell.seed == self.study.seeds[0]))
            except Interrupted:
                raise
            except Exception as error:  # one cell must not end the night for the others
                self.say(f"{title} failed: {cell.fail(error)}")
            gc.collect()
            if (cell.state(), read_measured(cell.folder)) != before:
                self.write()
        return True

    def _train(self, cell: Cell, title: str) -> Callable[[], Student]:
        """Train a cell unless that was done; returns what loads its student."""
        if cell.run.result.exists():
            return lambda: loaded(cell.folder)
        self.say(f"{title}: training")
        with self.progress(cell.title, cell.recipe) as report:
            result = distill(cell.recipe, cell.folder, resume=True, report=report)
        self.say(f"{title}: error {result.before.total:.4f} -> {result.after.total:.4f}, {result.seconds:.0f} s; measuring")
        return lambda: Student(result.student, base_of(cell.folder))

    def _measure_untrained(self, name: str, cells: Sequence[Cell], measurer: Measurer) -> None:
        cell = next(cell for cell in cells if cell.name == name)
        with claimed(self.folder / "locks" / f"{name}, untrained") as mine:
            if mine:
                alike = [other.folder for other in cells if other.name == name]
                subject = Subject(self.folder / "untrained" / name, lambda: make_student(cell.recipe), alike)
                try:
                    measurer.measure(subject)
                except (EditCompileError, RuntimeError, OSError) as error:
                    self.say(f"{name}, untrained: not measured: {error}")

    def _rows(self) -> Iterator[Row]:
        rows = [self._row(name) for name in self.study.configurations]
        yield teacher_row(self.folder / "teacher", rows)
        for row in rows:
            if row.name in self.study.untrained_names:
                yield _untrained_row(row, self.folder / "untrained" / row.name)
            yield row

    def _row(self, name: str) -> Row:
        cells = []
        for seed in self.study.seeds:
            cell = CellFolder(name, seed, self._place(name, seed))
            failure = cell.failure()
            place = cell.folder.relative_to(self.folder).as_posix()
            result = CellResult(seed=seed, folder=place, state=cell.state(), error=failure.error if failure is not None else None)
            cells.append((result, read_measured(cell.folder)))
        return row_of(name, "distilled", cells)

    def _drawn(self, name: str) -> Drawn | None:
        """Return what the first seed's student drew, or the next one's."""
        found = (Drawn.read(self._place(name, seed)) for seed in self.study.seeds)
        return next((drawn for drawn in found if drawn is not None), None)


@dataclass
class RunComparison:
    """A comparison of finished runs."""

    runs: list[Path]
    folder: Path
    measures: Measures
    say: Callable[[str], None]
    latency: Latency | None = None

    def run(self) -> Results:
        """Measure what is missing, beside each run's own files, and write the results."""
        self._check()
        names = _short_names(self.runs)
        recipe = load_recipe(self.runs[0] / "recipe.yaml")
        base = base_of(self.runs[0]) or recipe.model
        sizes = self.measures.flops if self.measures.flops is not None else _last_size(recipe)
        teacher = self.folder / "teacher"
        measurer = Measurer(base, recipe, self.measures, self.latency, sizes, teacher, self.folder / "locks" / "teacher")
        measurer.measure_teacher()
        rows = []
        for name, run in zip(names, self.runs, strict=True):
            self.say(f"{name}: measuring what is missing")
            try:
                with claimed(run / ".measuring", wait=True):
                    measured = measurer.measure(Subject(run, partial(loaded, run)))
            except OSError as error:
                raise StudyError(f"{run}: what is measured cannot be written beside the run's own files: {error}") from error
            rows.append(row_of(name, "distilled", [(CellResult(seed=None, folder=str(run), state="finished"), measured)]))
            gc.collect()
        results = Results(
            command=shlex.join(["edit-compile", "compare", *map(str, self.runs), "-o", str(self.folder)]),
            model=base,
            budget="as each run's recipe says",
            seeds=(),
            samples=self.measures.samples if measurer.is_demo else 0,
            machine=Machine.this(),
            rows=(teacher_row(teacher, rows), *rows),
        )
        drawn = [("teacher", Drawn.read(teacher)), *((name, Drawn.read(run)) for name, run in zip(names, self.runs, strict=True))]
        write_results(results, self.folder, drawn, self.measures.gallery)
        return results

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
    write_text(folder / MARKDOWN, markdown(results, GALLERY if captions else None))
    write_text(folder / RESULTS, results.model_dump_json(indent=2))


def teacher_row(folder: Path, rows: Sequence[Row]) -> Row:
    """Make the teacher's row; its FLOPs were counted with any of the others."""
    measured = read_measured(folder)
    row = row_of("teacher", "teacher", [(CellResult(seed=None, folder=folder.name, state="finished"), measured)])
    counted: dict[str, Any] = {}
    for other in rows:
        for name, spread in other.numbers.items():
            if name.startswith("flops.") and name.endswith(".teacher"):
                counted.setdefault(name.removesuffix(".teacher"), spread)
    return row.model_copy(update={"numbers": {**row.numbers, **counted}})


def _untrained_row(trained: Row, folder: Path) -> Row:
    """Make the row of a converted model before training; its error was measured when each cell began."""
    measured: Measured = read_measured(folder)
    row = row_of(trained.name, "untrained", [(CellResult(seed=None, folder=folder.name, state="finished"), measured)])
    before = {"error.after": trained.numbers["error.before"]} if "error.before" in trained.numbers and row.numbers else {}
    return row.model_copy(update={"numbers": {**row.numbers, **before}})


def _last_size(recipe: Recipe) -> tuple[tuple[int, ...], ...]:
    last = phases_of(recipe)[-1]
    return (tuple(video_size(last.height, last.width, last.frames)),)


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
