"""What the user sees of a comparison on the terminal."""

from __future__ import annotations

import os
import sys

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from edit_compile.study.results import Results, columns, notes, seeds_in_words, settings_in_words, shown


def results_table(results: Results) -> RenderableType:
    """Show a line for each model, with the spread over seeds below each median."""
    rows = shown(results)
    listed = columns(rows)
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", justify="left", overflow="fold")
    for column in ("seeds", *(column.title for column in listed)):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [column.text(row, between="-") for column in listed]
        shown_cells = [f"{text}\n[dim]{spread}[/]" if spread else text for text, spread in cells]
        table.add_row(escape(row.title), seeds_in_words(row), *shown_cells, style="bold" if row.kind == "teacher" else None)
    said = [f"[dim]{escape(line)}[/]" for line in settings_in_words(results)[1:]]
    return Group(table, *said, *(escape(note) for note in notes(results)))


def print_results(results: Results) -> None:
    """Print the table on stdout."""
    Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200, highlight=False).print(results_table(results))
