"""A limit for symbolic analysis, which takes minutes on some models, and a word to whoever waits."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from edit_compile.torch_internals import SymbolicAnalysis, raise_in_sympy, timing_symbolic_analysis, withdraw

log = logging.getLogger(__name__)

_STEP, _WORD = 0.5, 15.0  # seconds between two looks, and between two words


class OutOfTime(BaseException):
    """Ends a capture whose symbolic analysis has taken all its time; not an Exception, which torch's own code would handle."""


@contextmanager
def watched(what: str, limit: float | None = None) -> Iterator[None]:
    """Log every quarter of a minute that something is being captured, and end it if its symbolic analysis takes too long.

    Args:
        what: is captured.
        limit: for symbolic analysis, in seconds of computing; None for no limit.

    Raises:
        OutOfTime: the limit is reached.
    """

    def check(seconds: float) -> None:
        if limit is not None and seconds > limit:
            raise OutOfTime

    with timing_symbolic_analysis(check) as analysis, _watcher(what, limit, analysis):
        yield


@contextmanager
def _watcher(what: str, limit: float | None, analysis: SymbolicAnalysis) -> Iterator[None]:
    """Speak up while the caller waits, and end a single question that takes longer than the limit."""
    done, lock = threading.Event(), threading.Lock()

    def watch() -> None:
        start = said = time.monotonic()
        while not done.wait(_STEP):
            now = time.monotonic()
            if now - said > _WORD:
                said = now
                then = f"; after {limit:.0f} s of symbolic analysis the sizes of the example would be taken as they are" if limit else ""
                log.warning("capturing %s: %.0f s so far%s", what, now - start, then)
            with lock:
                if limit is not None and not done.is_set() and analysis.began is not None and analysis.seconds_so_far() > limit:
                    raise_in_sympy(analysis.thread, OutOfTime)

    thread = threading.Thread(target=watch, name="edit_compile capture", daemon=True)
    thread.start()
    try:
        yield
    finally:
        with lock:
            done.set()
            withdraw(analysis.thread)
        thread.join()
