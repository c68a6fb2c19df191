"""Tells whether a process goes on, waits for the others, or stands still: its threads stay where they are, and nothing is computed.

A step, a compilation or a measurement may take as long as it likes: it computes, in this process or in a child of it, or its stack changes.
What only sleeps is told from it by the system's clocks; a loop that never ends is not.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from edit_compile.distillation.processes import waits
from edit_compile.torch_internals import is_collective

State = Literal["moves", "waits", "still"]
_BUSY = 0.05  # of a CPU: less is what idle threads of libraries take
_LIBRARY, _PACKAGES = (sysconfig.get_path("stdlib"), "<frozen "), "site-packages"


class Movement:
    """What one thread of this process does, and how long it has been in one place.

    Attributes:
        place: the line that it was in at the last look.
        uncounted: CPU seconds of this process that are not of what it does.
    """

    def __init__(self, ignored: str) -> None:
        """
        Args:
            ignored: the name of the threads that look; the thread that makes this is the one looked at.
        """
        import psutil  # accelerate brings it, without which there is one process

        self._thread, self._native, self._ignored = threading.get_ident(), threading.get_native_id(), ignored
        self._process, self._stacks, self._cpu, self._children = psutil.Process(), dict[int, Any](), 0.0, 0.0
        self.place, self.uncounted, self._in_collective = "", 0.0, False
        self.forget()

    def forget(self) -> None:
        """Begin anew: no time has been seen to pass."""
        self._looked = self._placed = self._moved = time.monotonic()

    def look(self) -> None:
        """Note what changed since the last look."""
        now, frames, ignored = time.monotonic(), sys._current_frames(), self._ignored_threads()
        stacks = {thread: _places(frame) for thread, frame in frames.items() if thread not in ignored}
        cpu, allowed = time.process_time() - time.thread_time() - self.uncounted, _BUSY * (now - self._looked)
        if stacks.get(self._thread) != self._stacks.get(self._thread):
            self._placed = now
        is_busy = cpu - self._cpu > allowed or self._runs_or_reads() or waits.may_be_long
        if is_busy or stacks != self._stacks or self._children_compute(allowed):
            self._moved = now
        self.place, self._in_collective = _line(frames.get(self._thread)), is_collective(frames.get(self._thread))
        self._stacks, self._cpu, self._looked = stacks, cpu, now

    def state(self, seconds: float) -> State:
        """Say what the thread has done for so many seconds: waited for other processes, or stood still with the rest of this one."""
        if self._in_collective or waits.for_others:
            return "waits" if self._looked - self._placed > seconds else "moves"
        return "still" if self._looked - self._moved > seconds else "moves"

    def _ignored_threads(self) -> set[int | None]:
        return {thread.ident for thread in threading.enumerate() if thread.name == self._ignored}

    def _runs_or_reads(self) -> bool:
        """Say whether the thread has something to compute, though the machine may be too busy for it, or waits for a disk (of Linux)."""
        with suppress(OSError):
            stat = Path(f"/proc/{os.getpid()}/task/{self._native}/stat").read_text()
            return stat.rpartition(")")[2].split()[0] in ("R", "D")
        return False

    def _children_compute(self, allowed: float) -> bool:
        """Say whether child processes, such as compilers, took more than some CPU time since this was asked last."""
        import psutil

        taken = 0.0
        for child in self._process.children(recursive=True):
            with suppress(psutil.Error):
                times = child.cpu_times()
                taken += times.user + times.system
        before, self._children = self._children, taken
        return abs(taken - before) > allowed


def _line(frame: FrameType | None) -> str:
    """Name the innermost line that is not of Python's own library."""
    found = frame
    while found is not None and found.f_code.co_filename.startswith(_LIBRARY) and _PACKAGES not in found.f_code.co_filename:
        found = found.f_back
    found = found or frame
    return "" if found is None else f"{found.f_code.co_filename}:{found.f_lineno} ({found.f_code.co_name})"


def _places(frame: FrameType | None) -> list[tuple[Any, int]]:
    found = []
    while frame is not None:
        found.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return found
