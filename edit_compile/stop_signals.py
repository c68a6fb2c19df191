"""SIGINT and SIGTERM in commands: the first one unwinds, or lets training save; a second one ends the process, whatever it is doing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 10.0  # seconds in which a stopped command must have ended: a thread of its data may hang
_ONE_STOP = 1.0  # seconds


class Stopped(KeyboardInterrupt):
    """A signal asked to stop. Derives from what Python raises at SIGINT, so that all who clean up do."""


def is_passed_on(seconds: float) -> bool:
    """Say whether a signal so many seconds after another is the same stop: a launcher passes on what the terminal sent to all processes."""
    return seconds < _ONE_STOP and "TORCHELASTIC_RUN_ID" in os.environ


def second_ends_the_process() -> bool:
    """Say whether a second signal ends this process, whatever handlers there are."""
    return _current is not None


class _Watch:
    """Hears of signals in a thread of its own: the main thread may be in a call that never returns to Python."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._since, self._raised = 0.0, False
        self._listening, self._sending = os.pipe()
        os.set_blocking(self._sending, False)
        self._before: dict[int, Any] = {number: signal.signal(number, self._raise) for number in _SIGNALS}
        self._sent_before = signal.set_wakeup_fd(self._sending, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, daemon=True, name="edit_compile-signals").start()

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if not self._raised:
            self.number, self._raised = self.number or number, True
            raise Stopped

    def _listen(self) -> None:
        while received := os.read(self._listening, 1):
            now, number = time.monotonic(), received[0]
            if number not in _SIGNALS:
                continue
            if not self._since:
                self.number, self._since = number, now
            elif not is_passed_on(now - self._since):
                _end(number, "stopped at once\n")
        os.close(self._listening)

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._sent_before)
        os.close(self._sending)

    def forget(self) -> None:
        """Leave the signals of a forked process to itself: both would count as this one's."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _end(number: int, line: str = "") -> None:
    with suppress(OSError):
        os.write(2, line.encode())
    os._exit(128 + number)


_current: _Watch | None = None


def stopped_status() -> int:
    """Return the exit status of a command that a signal has stopped, as shells give it: 130 of SIGINT, 143 of SIGTERM."""
    return 128 + (_current.number if _current is not None and _current.number is not None else signal.SIGINT)


@contextmanager
def stopping_on_signals(*, program: bool) -> Iterator[None]:
    """Let SIGINT and SIGTERM raise `Stopped` inside, unless handlers that are set inside do something else.

    A second signal ends the process at once, with a line. Only the main thread can have handlers; in others signals are left alone.

    Args:
        program: nothing comes after the block: once it was stopped, the process ends, even if threads hang.
    """
    global _current
    if threading.current_thread() is not threading.main_thread() or _current is not None:
        yield
        return
    _current = watch = _Watch()
    try:
        yield
    finally:
        if program and watch.number is not None:
            last = threading.Timer(_PATIENCE, _end, (watch.number,))
            last.daemon = True
            last.start()
        else:
            watch.close()
            _current = None


def _after_fork() -> None:
    global _current
    if _current is not None:
        with suppress(ValueError):  # the thread that forked was not the main one, and has no handlers
            _current.forget()
        _current = None


os.register_at_fork(after_in_child=_after_fork)
