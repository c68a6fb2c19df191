"""SIGINT and SIGTERM ask the run to save and stop; a second signal stops it at once."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from edit_compile.stop_signals import is_passed_on, second_ends_the_process

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
log = logging.getLogger(__name__)


class Interrupt:
    """Whether a signal has asked to stop, and since when, on the monotonic clock."""

    def __init__(self) -> None:
        self.requested, self.since = False, 0.0


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Let the first signal set `requested` inside. Only the main thread can have handlers; in others signals are left alone."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}

    def ask(number: int, frame: FrameType | None) -> None:
        if interrupt.requested:
            if not second_ends_the_process() and not is_passed_on(time.monotonic() - interrupt.since):
                signal.signal(number, before[number])
                signal.raise_signal(number)
            return
        interrupt.requested, interrupt.since = True, time.monotonic()
        if os.environ.get("RANK", "0") == "0":  # of several processes, which all got it
            log.warning("stopping as soon as what is needed to continue is saved; a second signal stops at once")

    for number in before:
        signal.signal(number, ask)
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
