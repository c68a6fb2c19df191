"""`edit_compile.grid`: stating the grid of image tokens where it does not follow from the inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from edit_compile.errors import GridError
from edit_compile.student.grid_sources import Grids
from edit_compile.student.handle import conversion_of, unwrap
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
    images: Sequence[Any] = sizes if sizes and all(isinstance(each, Sequence) and not isinstance(each, str) for each in sizes) else (sizes,)
    if not all(_is_grid(each) for each in images):
        found = ", ".join(map(repr, sizes)) or "none"
        raise GridError(
            f"a grid is two positive whole numbers of image tokens (three for video), or a sequence of them for each of several images, "
            f"not {found}"
        )
    grids = tuple(as_grid(tuple(each)) for each in images)
    with conversion_of(model).runtime.stating(Statement(grid=grids)):
        yield


def _is_grid(sizes: object) -> bool:
    counts = isinstance(sizes, Sequence) and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
    return counts and isinstance(sizes, Sequence) and len(sizes) in (2, 3)


def grid_of_inputs(model: Any, inputs: Mapping[str, Any]) -> Grids | None:
    """Tell the grids that a forward with these keyword arguments would find: of the image, or of each of several.

    Of a model with several resolutions, the finest that a site is on. None if the grid has to be stated.
    """
    source = conversion_of(model).runtime.source
    try:
        grids = source.sizes(unwrap(model), (), inputs, None)
    except GridError:
        return None
    return next((each for number, each in enumerate(grids) if source.is_base(number)), grids[0])
