"""How far long work is: whoever does it says so, and whoever shows it listens. Without a listener nothing happens."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Work:
    """Something that takes time.

    Attributes:
        what: is being done, in a few words.
        done, total: how much of it, and of how much; total is None where that is not known.
        note: what else there is to say, such as a loss.
    """

    def __init__(self, what: str, total: int | None = None, done: int = 0) -> None:
        self.what, self.total, self.done, self.note = what, total, done, ""
        self.listener, self.last = _listener.get(), time.monotonic()

    def per_second(self, number: int) -> float:
        """Say that so much more is done; returns how much of it a second was done since the last time."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        self.advance(number)
        return number / max(seconds, 1e-9)

    def advance(self, number: int = 1) -> None:
        """Say that so much more is done."""
        self.done += number
        if self.listener is not None:
            self.listener.advanced(self)


class Listener(Protocol):
    """Shows work. Work may be done by several threads at once."""

    def began(self, work: Work) -> None: ...

    def advanced(self, work: Work) -> None: ...

    def ended(self, work: Work) -> None: ...

    def closed(self) -> None:
        """Nothing more is told; what has not ended was left by an error."""
        ...


_listener: ContextVar[Listener | None] = ContextVar("edit_compile progress", default=None)


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Tell a listener of all work that is begun inside, in this thread or asyncio task; None for nobody."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
        if listener is not None:
            listener.closed()


@contextmanager
def working(what: str, total: int | None = None, done: int = 0) -> Iterator[Work]:
    """Say that something takes time; what is yielded says how far it is."""
    work = Work(what, total, done)
    if work.listener is None:
        yield work
        return
    work.listener.began(work)
    try:
        yield work
    finally:
        work.listener.ended(work)


def each(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Yield items, and say after each how many are done."""
    with working(what, total) as work:
        for item in items:
            yield item
            work.advance()
