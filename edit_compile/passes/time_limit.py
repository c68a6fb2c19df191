"""A limit for symbolic analysis, which takes minutes on some models, and a word to whoever waits."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from edit_compile.torch_internals import raise_in_thread

log = logging.getLogger(__name__)

_STEP = 0.05  # seconds between two looks
_WORD = 15.0  # seconds between two words
_SYMBOLIC = ("/sympy/", "torch/utils/_sympy/", "torch/fx/experimental/symbolic_shapes.py")  # the files of symbolic analysis
_INTERRUPTIBLE = _SYMBOLIC[:2]  # pure functions: nothing is left half done


class OutOfTime(BaseException):
    """Ends a capture whose symbolic analysis has taken all its time; not an Exception, which torch's own code would handle."""


@dataclass
class _Watch:
    thread: int
    what: str
    limit: float | None
    done: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        start = said = time.monotonic()
        spent, clock = 0.0, _cpu_time(self.thread)
        while not self.done.wait(_STEP):
            now, before, clock = time.monotonic(), clock, _cpu_time(self.thread)
            frame = sys._current_frames().get(self.thread)
            if _inside(frame, _SYMBOLIC, depth=4):
                spent += clock - before
            if now - said > _WORD:
                said = now
                self._say(now - start)
            if self.limit is not None and spent > self.limit:
                self._interrupt()

    def _say(self, seconds: float) -> None:
        limit = f"; the sizes of the example are taken as they are after {self.limit:g} s of symbolic analysis" if self.limit else ""
        log.warning("capturing %s: %.0f s so far%s", self.what, seconds, limit)

    def _interrupt(self) -> None:
        """Raise in the thread if it is in a pure function right now: it holds there until this thread lets it go on."""
        with self.lock:
            frame = sys._current_frames().get(self.thread)
            if not self.done.is_set() and _inside(frame, _INTERRUPTIBLE, depth=1):
                raise_in_thread(self.thread, OutOfTime)


def _inside(frame: FrameType | None, files: tuple[str, ...], depth: int) -> bool:
    """Say whether one of the innermost frames is in one of some files."""
    while frame is not None and depth:
        name = frame.f_code.co_filename.replace("\\", "/")
        if any(part in name for part in files):
            return True
        frame, depth = frame.f_back, depth - 1
    return False


def _cpu_time(thread: int) -> float:
    """Return the seconds that a thread has computed; where the system does not tell, the time of day."""
    try:
        return time.clock_gettime(time.pthread_getcpuclockid(thread))
    except (AttributeError, OSError):
        return time.monotonic()


@contextmanager
def watched(what: str, limit: float | None = None) -> Iterator[None]:
    """Log every quarter of a minute that something is being captured, and end it if its symbolic analysis takes too long.

    Args:
        what: is captured.
        limit: for symbolic analysis, in seconds of computing; None for no limit.

    Raises:
        OutOfTime: the limit is reached.
    """
    watch = _Watch(threading.get_ident(), what, limit)
    thread = threading.Thread(target=watch.run, name="edit_compile capture", daemon=True)
    thread.start()
    try:
        yield
    finally:
        with watch.lock:
            watch.done.set()
            raise_in_thread(watch.thread, None)
        thread.join()
