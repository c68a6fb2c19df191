"""`edit_compile.grid`: stating the grid of image tokens where it does not follow from the inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edit_compile.errors import GridError
from edit_compile.student.handle import conversion_of
from edit_compile.student.runtime import Statement, as_grid


@contextmanager
def grid(model: Any, *sizes: int) -> Iterator[None]:
    """State the grid of image tokens for the forwards inside, where it does not follow from the inputs or must not be
    read from them (position ids under torch.compile and torch.export).

    It holds for this thread or asyncio task only.

    Args:
        model: a converted model, or what holds one (see `conversion_of`).
        sizes: height and width, or frames, height and width, in image tokens. Of a model with several resolutions, the
            finest; the others follow from the inputs.

    Raises:
        GridError: not a grid, or (in the forward) one that the model's inputs cannot have.
    """
    if len(sizes) not in (2, 3) or not all(isinstance(size, int) and size > 0 for size in sizes):
        found = " x ".join(map(repr, sizes))
        raise GridError(f"a grid is two positive whole numbers of image tokens (three for video), not {found or 'none'}")
    with conversion_of(model).runtime.stating(Statement(grid=as_grid(sizes))):
        yield
