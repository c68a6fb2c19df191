"""Preparing batches ahead of their use, in another thread. Data depends on the position alone, so the results are the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def prefetch(make: Callable[[Item], Made], items: Iterable[Item], depth: int = 2) -> Iterator[Made]:
    """Yield `map(make, items)`, computed up to `depth` results ahead. Errors are raised where the result would be yielded."""
    waiting: deque[Future[Made]] = deque()
    remaining = iter(items)
    with ThreadPoolExecutor(1, "edit_compile-data") as pool:
        try:
            for item in islice(remaining, depth):
                waiting.append(pool.submit(make, item))
            while waiting:
                made = waiting.popleft().result()
                waiting.extend(pool.submit(make, item) for item in islice(remaining, 1))
                yield made
        finally:
            for future in waiting:
                future.cancel()
