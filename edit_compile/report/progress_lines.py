"""How far long work is, in a line: what a terminal shows of it all the time, and what is said now and then where there is none."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from threading import Lock

from edit_compile.progress import Work
from edit_compile.words import clock

_REMEMBERED = 100  # steps, of which the time left is estimated


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


class ProgressLines:
    """Says a line of long work at most every half minute. A listener of `edit_compile.progress`."""

    def __init__(self, say: Callable[[str], None], every: float = 30.0) -> None:
        """
        Args:
            every: seconds.
        """
        self.say, self.every = say, every
        self._lock = Lock()
        self._paces: dict[int, Pace] = {}
        self._last = time.monotonic()

    def began(self, work: Work) -> None:
        with self._lock:
            self._paces[id(work)] = Pace(work.done)

    def advanced(self, work: Work) -> None:
        with self._lock:
            pace = self._paces.get(id(work))
            if pace is None:
                return
            pace.add(work.done)
            if time.monotonic() - self._last < self.every:
                return
            self._last = time.monotonic()
            line = line_of(work, pace)
        self.say(line)

    def ended(self, work: Work) -> None:
        with self._lock:
            self._paces.pop(id(work), None)

    def closed(self) -> None:
        with self._lock:
            self._paces.clear()
