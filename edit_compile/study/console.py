"""What the user sees of a comparison on the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape

from edit_compile.report.folded_table import FoldedTable
from edit_compile.report.terminal import make_console
from edit_compile.study.results import Results, columns, notes, seeds_in_words, settings_in_words, shown


def results_table(results: Results) -> RenderableType:
    """Show a line for each model, with the spread over seeds below each median."""
    rows = shown(results)
    listed, lines = columns(rows), []
    for row in rows:
        cells = [column.text(row, between="-") for column in listed]
        numbers = [f"{text}\n[dim]{spread}[/]" if spread else text for text, spread in cells]
        lines.append([escape(row.title), seeds_in_words(row), *numbers])
    teachers = {number for number, row in enumerate(rows) if row.kind == "teacher"}
    table = FoldedTable(["", "seeds", *(column.title for column in listed)], lines, bold=teachers)
    said = [f"[dim]{escape(line)}[/]" for line in settings_in_words(results)[1:]]
    return Group(table, "", *said, *(escape(note) for note in notes(results)))


def print_results(results: Results) -> None:
    """Print the table on stdout."""
    make_console().print(results_table(results))
