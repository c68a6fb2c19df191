"""Work in progress on a terminal: a line for each piece, which is gone when it is done."""

from __future__ import annotations

from threading import Lock

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from edit_compile.progress import Work
from edit_compile.report.progress_lines import Pace, line_of

_PER_SECOND = 4  # updates


class ProgressDisplay:
    """Shows work on stderr as long as there is any. A listener of `edit_compile.progress`.

    What else is printed to stderr meanwhile appears above it.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._lock = Lock()
        self._shown: dict[int, tuple[Work, Pace]] = {}
        self._live = self._new_live()

    def _new_live(self) -> Live:
        return Live(console=self.console, get_renderable=self.lines, refresh_per_second=_PER_SECOND, transient=True, redirect_stdout=False)

    def began(self, work: Work) -> None:
        with self._lock:
            self._shown[id(work)] = (work, Pace(work.done))
            first = len(self._shown) == 1
        if first:
            self._live.start(refresh=True)

    def advanced(self, work: Work) -> None:
        with self._lock:
            if id(work) in self._shown:
                self._shown[id(work)][1].add(work.done)

    def ended(self, work: Work) -> None:
        with self._lock:
            self._shown.pop(id(work), None)
            last = not self._shown
        if last:
            self._live.stop()
            self._live = self._new_live()

    def closed(self) -> None:
        with self._lock:
            left = [work for work, _ in self._shown.values()]
        for work in left:
            self.ended(work)

    def lines(self) -> Group:
        """Render a line for each piece of work, outer ones first; what does not fit into a line is cut at its end."""
        with self._lock:
            shown = list(self._shown.values())
        return Group(*(Text(line_of(work, pace), no_wrap=True, overflow="ellipsis") for work, pace in shown))
