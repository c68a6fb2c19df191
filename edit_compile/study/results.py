"""The results of a comparison as plain data: a row for each model, numbers over its seeds, and why numbers are missing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import Field

from edit_compile.bench.machine import Machine
from edit_compile.distillation.evaluate.validation import MEASURE
from edit_compile.frozen import Frozen
from edit_compile.report.markdown import markdown_table
from edit_compile.report.tables import format_si
from edit_compile.study.measured import Measurements
from edit_compile.words import counted

Kind = Literal["teacher", "untrained", "distilled"]


class Spread(Frozen):
    """A number over seeds."""

    median: float
    least: float
    greatest: float
    count: int
    """Of seeds."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise the numbers of some seeds."""
        return cls(median=statistics.median(values), least=min(values), greatest=max(values), count=len(values))


class CellResult(Frozen):
    """One run."""

    seed: int | None
    folder: str
    state: str
    """finished, trained (to be measured), failed, unfinished or not begun."""
    error: str | None = None
    """Why it failed."""
    numbers: dict[str, float] = Field(default_factory=dict)
    """What was measured, as KIND.NAME."""


class ModelRow(Frozen):
    """A model of the table."""

    name: str
    kind: Kind
    cells: tuple[CellResult, ...]
    """One for each seed."""
    numbers: dict[str, Spread] = Field(default_factory=dict)
    """Over the cells that have them."""
    reasons: dict[str, str] = Field(default_factory=dict)
    """Why a kind of numbers is missing."""

    @property
    def title(self) -> str:
        """Name the row."""
        return f"{self.name}, untrained" if self.kind == "untrained" else self.name

    @property
    def finished(self) -> int:
        """How many of its cells are finished."""
        return sum(cell.state == "finished" for cell in self.cells)


class Results(Frozen):
    """What `results.json` holds."""

    version: Literal[2] = 2
    command: str
    model: str
    budget: str
    """In words."""
    seeds: tuple[int, ...]
    samples: int
    """Held-out captions that each model drew."""
    machine: Machine
    """On which the results were put together; cells may have been done on others."""
    rows: tuple[ModelRow, ...]

    @property
    def failed(self) -> tuple[CellResult, ...]:
        """The cells that failed."""
        return tuple(cell for row in self.rows for cell in row.cells if cell.state == "failed")

    def _repr_markdown_(self) -> str:
        return markdown(self, None)


def row_of(name: str, kind: Kind, cells: Sequence[tuple[CellResult, Measurements]]) -> ModelRow:
    """Put the cells of a model together."""
    done = [(cell.model_copy(update={"numbers": measured.numbers()}), measured) for cell, measured in cells]
    names = dict.fromkeys(name for cell, _ in done for name in cell.numbers)
    numbers = {name: Spread.of([cell.numbers[name] for cell, _ in done if name in cell.numbers]) for name in names}
    reasons = {kind: reason for _, measured in done for kind, reason in measured.reasons().items()}
    return ModelRow(name=name, kind=kind, cells=tuple(cell for cell, _ in done), numbers=numbers, reasons=reasons)


class Column(NamedTuple):
    """A column of the table. `low` and `high` name the numbers that are its spread where that is not over seeds."""

    title: str
    number: str
    format: str
    low: str | None = None
    high: str | None = None

    def text(self, row: ModelRow, *, between: str = " to ") -> tuple[str, str]:
        """Return a row's number, and its spread if it has one; a dash where it is missing. Of fewer seeds than the row, it says so."""
        found = row.numbers.get(self.number)
        if found is None:
            return "-", ""
        low, high = found.least, found.greatest
        if self.low in row.numbers and self.high in row.numbers:
            low, high = row.numbers[self.low].median, row.numbers[self.high].median
        words = [_formatted(value, self.format) for value in (found.median, low, high)]
        count = f", {counted(found.count, 'seed')}" if row.kind == "distilled" and found.count != row.finished else ""
        return words[0] + count, f"{words[1]}{between}{words[2]}" if low != high else ""


def _formatted(value: float, how: str) -> str:
    if how == "si":
        return format_si(round(value))
    if how == "error":
        return f"{value:.4f}" if value >= 0.001 else f"{value:.1e}" if value else "0"
    if how == "ratio":
        return f"{value:.2f}x"
    return f"{value:{how}}"


_SHARES = {"all": "all of it"}


def columns(rows: Sequence[ModelRow]) -> list[Column]:
    """List the columns for which any row has a number."""
    found = dict.fromkeys(name for row in rows for name in row.numbers)
    listed = [Column("error before", "error.before", "error"), Column("error", "error.after", "error")]
    further = [name.split(".")[1] for name in found if name.startswith("error.") and name.endswith(".after") and name.count(".") == 2]
    listed += [Column(f"error at {size}", f"error.{size}.after", "error") for size in further]
    shares = [name.partition(".")[2] for name in found if name.startswith("adherence.")]
    listed += [Column(_SHARES.get(name, name.replace("_", " ")), f"adherence.{name}", ".1%") for name in shares]
    listed += [Column("Frechet to real", "frechet.real", ".3g"), Column("Frechet to teacher's", "frechet.teacher", ".3g")]
    sizes = [name.split(".")[1] for name in found if name.startswith("flops.") and name.count(".") == 1]
    for size in sizes:
        listed += [Column(f"FLOPs at {size}", f"flops.{size}", "si"), Column("of the teacher's", f"flops.{size}.ratio", "ratio")]
    listed += [Column("parameters added", "parameters.added", "si")]
    timed = [name.removesuffix(".ratio") for name in found if name.startswith("latency.") and name.endswith(".ratio")]
    for name in timed:
        title = f"time at {name.removeprefix('latency.')}, of teacher's"
        listed += [Column(title, f"{name}.ratio", "ratio", f"{name}.ratio.low", f"{name}.ratio.high")]
    listed += [Column("seconds", "training.seconds", ".0f")]
    return [column for column in listed if column.number in found]


def seeds_in_words(row: ModelRow) -> str:
    """Say how many of a row's cells are finished: `3`, or `2 of 3`."""
    if row.kind != "distilled":
        return ""
    return str(row.finished) if row.finished == len(row.cells) else f"{row.finished} of {len(row.cells)}"


def shown(results: Results) -> list[ModelRow]:
    """Select the rows that have numbers."""
    return [row for row in results.rows if row.numbers]


def notes(results: Results) -> list[str]:
    """Say what the table does not: failed cells, missing ones, and why numbers are missing."""
    said = [f"{row.title}{_seed(cell)} failed: {cell.error}" for row in results.rows for cell in row.cells if cell.state == "failed"]
    waiting = [
        f"{row.title}{_seed(cell)}" for row in results.rows for cell in row.cells if cell.state in ("unfinished", "not begun", "trained")
    ]
    said += [f"not finished: {', '.join(waiting)}"] if waiting else []
    reasons: dict[str, list[str]] = {}
    for row in results.rows:
        for kind, reason in row.reasons.items():
            reasons.setdefault(f"{kind}: {reason}", []).append(row.title)
    students = {row.title for row in shown(results) if row.kind != "teacher"}
    return [*said, *(line if students <= {*titles} else f"{line} ({', '.join(titles)})" for line, titles in reasons.items())]


def _seed(cell: CellResult) -> str:
    return "" if cell.seed is None else f", seed {cell.seed}"


def settings_in_words(results: Results) -> list[str]:
    """Say how the numbers came about."""
    seeds = (
        f"seeds {', '.join(map(str, results.seeds))}; medians over them, in brackets the least and the greatest" if results.seeds else ""
    )
    samples = f"each model drew {results.samples} held-out captions" if results.samples else ""
    return [
        f"`{results.command}`",
        f"{results.model}; budget: {results.budget}" + "".join(f"; {part}" for part in (seeds, samples) if part),
        str(results.machine),
        f"error: {MEASURE}",
    ]


def markdown(results: Results, gallery: str | None) -> str:
    """Write the table, to be pasted, with all that it takes to repeat it.

    Args:
        gallery: the image to show, relative to the file.
    """
    rows, listed = shown(results), columns(shown(results))
    lines = []
    for row in rows:
        cells = [column.text(row) for column in listed]
        lines.append([row.title, seeds_in_words(row), *(f"{text} ({spread})" if spread else text for text, spread in cells)])
    table = markdown_table(["", "seeds", *(column.title for column in listed)], lines)
    parts = [f"# {results.model}", table, *settings_in_words(results), *notes(results), *([f"![gallery]({gallery})"] if gallery else [])]
    return "\n\n".join(parts) + "\n"
