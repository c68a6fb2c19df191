"""Work in progress on a terminal: a line for each piece, which is gone when it is done."""

from __future__ import annotations

import time
from collections import deque
from threading import Lock

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from edit_compile.progress import Work

_PER_SECOND = 4  # updates
_REMEMBERED = 100  # steps, of which the time left is estimated


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


class Pace:
    """How fast work is done, by its last steps."""

    def __init__(self, done: int) -> None:
        self.began = time.monotonic()
        self._steps = deque([(self.began, done)], _REMEMBERED)

    def add(self, done: int) -> None:
        """Note that so much is done now."""
        self._steps.append((time.monotonic(), done))

    @property
    def seconds(self) -> float:
        """The seconds since the work began."""
        return time.monotonic() - self.began

    def left(self, total: int) -> float | None:
        """Estimate the seconds that the rest of the work takes; None before the first step is done."""
        (then, before), (now, done) = self._steps[0], self._steps[-1]
        if done <= before:
            return None
        return max((now - then) / (done - before) * (total - done) - (time.monotonic() - now), 0.0)


def line_of(work: Work, pace: Pace) -> str:
    """Say in a line what is done, how far it is, the time left, and what else there is to say, in this order."""
    if work.total is None:
        parts = [work.what, *([f"{work.done:,}"] if work.done else []), clock(pace.seconds)]
    else:
        left = pace.left(work.total)
        parts = [work.what, f"{work.done:,}/{work.total:,}", f"{clock(left)} left" if left is not None else clock(pace.seconds)]
    return "  ".join([*parts, *([work.note] if work.note else [])])


def clock(seconds: float) -> str:
    """Write a duration as 0:07, 12:34 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
