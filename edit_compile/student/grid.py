"""`edit_compile.grid`: stating the grid of image tokens where it does not follow from the inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from edit_compile.errors import GridError
from edit_compile.student.handle import conversion_of
from edit_compile.student.runtime import Statement, as_grid


@contextmanager
def grid(model: Any, *sizes: int | Sequence[int]) -> Iterator[None]:
    """State the grid of image tokens for the forwards inside, where it does not follow from the inputs or must not be
    read from them (position ids under torch.compile and torch.export).

    It holds for this thread or asyncio task only.

        with edit_compile.grid(model, 64, 48): ...                  # an image
        with edit_compile.grid(model, 21, 30, 52): ...              # a video
        with edit_compile.grid(model, (64, 48), (32, 32)): ...      # two images, one after the other in one sequence

    Args:
        model: a converted model, or what holds one (see `conversion_of`).
        sizes: height and width, or frames, height and width, in image tokens; for several images, a sequence of them each, in the
            order of their tokens. Of a model with several resolutions, the finest; the others follow from the inputs.

    Raises:
        GridError: not a grid, or (in the forward) one that the model's inputs cannot have.
    """
    images = sizes if sizes and all(isinstance(each, Sequence) and not isinstance(each, str) for each in sizes) else (sizes,)
    if not all(_is_grid(each) for each in images):
        found = ", ".join(map(repr, sizes)) or "none"
        raise GridError(
            f"a grid is two positive whole numbers of image tokens (three for video), or a sequence of them for each of several images, "
            f"not {found}"
        )
    grids = tuple(as_grid(tuple(each)) for each in images if isinstance(each, Sequence))
    with conversion_of(model).runtime.stating(Statement(grid=grids)):
        yield


def _is_grid(sizes: object) -> bool:
    counts = isinstance(sizes, Sequence) and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
    return counts and isinstance(sizes, Sequence) and len(sizes) in (2, 3)
