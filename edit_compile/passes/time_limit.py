"""A limit for symbolic analysis, which takes minutes on some models, and a word to whoever waits."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from edit_compile.torch_internals import on_symbolic_analysis

log = logging.getLogger(__name__)

_WORD = 15.0  # seconds between two words


class OutOfTime(BaseException):
    """Ends a capture whose symbolic analysis has taken all its time; not an Exception, which torch's own code would handle."""


@dataclass
class _Watch:
    """What a capture has taken so far. It is asked in the capture's own thread: looking on from another changes what export records."""

    what: str
    limit: float | None
    spent: float = 0.0
    start: float = field(default_factory=time.monotonic)
    said: float = field(default_factory=time.monotonic)

    def add(self, seconds: float) -> None:
        """Add seconds of symbolic analysis.

        Raises:
            OutOfTime: the limit is reached.
        """
        self.spent += seconds
        now = time.monotonic()
        if now - self.said > _WORD:
            self.said = now
            self._say(now - self.start)
        if self.limit is not None and self.spent > self.limit:
            raise OutOfTime

    def _say(self, seconds: float) -> None:
        limit = f"; the sizes of the example are taken as they are after {self.limit:.0f} s of symbolic analysis" if self.limit else ""
        log.warning("capturing %s: %.0f s so far%s", self.what, seconds, limit)


@contextmanager
def watched(what: str, limit: float | None = None) -> Iterator[None]:
    """Log every quarter of a minute that something is being captured, and end it if its symbolic analysis takes too long.

    Args:
        what: is captured.
        limit: for symbolic analysis, in seconds of computing; None for no limit.

    Raises:
        OutOfTime: the limit is reached.
    """
    with on_symbolic_analysis(_Watch(what, limit).add):
        yield
