"""Drawing samples ahead of their use, in another thread. Data is a function of the position, so nothing changes by it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Drawn = TypeVar("Drawn")


def ahead(draw: Callable[[Item], Drawn], items: Iterable[Item], depth: int = 2) -> Iterator[Drawn]:
    """`map(draw, items)`, up to `depth` results ahead. Errors come where the result would."""
    waiting: deque[Future[Drawn]] = deque()
    remaining = iter(items)
    with ThreadPoolExecutor(1, "edit_compile-data") as pool:
        try:
            for item in islice(remaining, depth):
                waiting.append(pool.submit(draw, item))
            while waiting:
                drawn = waiting.popleft().result()
                waiting.extend(pool.submit(draw, item) for item in islice(remaining, 1))
                yield drawn
        finally:
            for future in waiting:
                future.cancel()
