"""Preparing batches ahead of their use, in another thread. Data depends on the position alone, so the results are the same."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from itertools import islice
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def prefetch(make: Callable[[Item], Made], items: Iterable[Item], depth: int = 2) -> Iterator[Made]:
    """Yield `map(make, items)`, computed up to `depth` results ahead. Errors are raised where the result would be yielded.

    Nothing ever waits for the thread to end: data may hang.
    """
    waiting: deque[Future[Made]] = deque()
    remaining = iter(items)
    asked: SimpleQueue[tuple[Future[Made], Item] | None] = SimpleQueue()

    def ask(number: int) -> None:
        for item in islice(remaining, number):
            waiting.append(Future())
            asked.put((waiting[-1], item))

    threading.Thread(target=_answer, args=(make, asked), daemon=True, name="edit_compile-data").start()
    try:
        ask(depth)
        while waiting:
            made = waiting.popleft().result()
            ask(1)
            yield made
    finally:
        for future in waiting:
            future.cancel()
        asked.put(None)


def _answer(make: Callable[[Item], Made], asked: SimpleQueue[tuple[Future[Made], Item] | None]) -> None:
    while (order := asked.get()) is not None:
        future, item = order
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(make(item))
            except BaseException as error:
                future.set_exception(error)
