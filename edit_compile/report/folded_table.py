"""Tables that fit a terminal of any width."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

_GAP = 2  # between columns


@dataclass(frozen=True)
class FoldedTable:
    """A table whose columns go on below, with the first one repeated, where the terminal is too narrow: no number is cut.

    Attributes:
        head: titles, whose words stand below each other where the table is too wide otherwise.
        rows: of cells, with markup.
        left: the numbers of columns that are aligned to the left.
        bold: the numbers of rows.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Container[int] = (0,)
    bold: Container[int] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cells = [self._width(number) for number in range(len(self.head))]
        widths = [max(width, cell_len(title)) for width, title in zip(cells, self.head, strict=True)]
        if sum(widths) + _GAP * (len(widths) - 1) > options.max_width:
            widths = [min(cells[0], options.max_width // 2), *cells[1:]]
        room, part = options.max_width - widths[0], list[int]()
        for number, width in list(enumerate(widths))[1:]:
            if part and room < width + _GAP:
                yield from (self._part(part, widths), "")
                room, part = options.max_width - widths[0], []
            part.append(number)
            room -= width + _GAP
        yield self._part(part, widths)

    def _width(self, number: int) -> int:
        lines = (line for row in self.rows for line in Text.from_markup(row[number]).plain.splitlines())
        return max(map(cell_len, (*lines, *self.head[number].split(), "")))

    def _part(self, numbers: Sequence[int], widths: Sequence[int]) -> Table:
        table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, _GAP, 0, 0))
        shown = [0, *numbers]
        for number in shown:
            justify: Literal["left", "right"] = "left" if number in self.left else "right"
            table.add_column(self.head[number], width=widths[number], overflow="fold", justify=justify)
        for place, row in enumerate(self.rows):
            table.add_row(*(row[number] for number in shown), style="bold" if place in self.bold else None)
        return table
