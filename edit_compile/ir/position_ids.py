"""Reading grids off position ids: whichever columns count frames, rows and columns, in whatever unit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from edit_compile.errors import GridError

MAX_ID_COLUMNS = 8  # more numbers than this per token are features, not a position
MAX_GRID_DIMS = 3
MAX_IMAGES = 64  # in one sequence
MAX_UNEVENNESS = 0.5  # of steps, as rounding in half precision makes it

Sizes = tuple[int, ...]  # (h, w) or (t, h, w), in image tokens


@dataclass(frozen=True)
class _Grid:
    """A run of positions: its sizes, slowest first, and the column of the ids that counts along each."""

    sizes: Sizes
    columns: tuple[int, ...]


def grids_of_ids(ids: Tensor, name: str, rows_and_columns: tuple[int, int] | None = None) -> tuple[Sizes, ...]:
    """Read the grids of the images that position ids name one after the other: (h, w), or (t, h, w) of a video.

    Every image is a full grid in row-major order: one column of the ids counts columns, one rows, one may count frames, each in
    even steps of any size and sign, from any start. Several images are told apart by another column, which is the same all over an
    image, or all begin at the same position.

    Args:
        ids: (N, D), or (B, N, D) with the same grids in all samples.
        name: of the input, for the error.
        rows_and_columns: which columns of the ids count rows and columns, if that is known: of one row or column alone, it
            cannot be seen.

    Raises:
        GridError: they are not such positions.
    """
    if ids.ndim not in (2, 3) or ids.shape[-1] > MAX_ID_COLUMNS or not ids.shape[-2] or not ids.isfinite().all():
        raise GridError(f"{name} of shape {tuple(ids.shape)} holds no positions: (N, D) or (B, N, D) with a few columns D is expected")
    samples = ids.detach().cpu().double()
    samples = samples[None] if samples.ndim == 2 else samples
    found = _grids(samples[0], rows_and_columns)
    others = [] if bool((samples == samples[:1]).all()) else [_grids(sample, rows_and_columns) for sample in samples[1:]]
    if found is None or any(other != found for other in others):
        why = "are not full grids in row-major order" if found is None else "are on other grids from sample to sample"
        raise GridError(
            f"{name} names {samples.shape[1]} positions that {why}; wrap the call in edit_compile.grid(model, height, width), "
            "or edit_compile.grid(model, (h1, w1), (h2, w2)) for several images"
        )
    return found


def roles_in_ids(ids: Tensor) -> tuple[int, int] | None:
    """Return which columns of position ids (N, D) or (B, N, D) count rows and columns; None if no image in them has both."""
    samples = ids.detach().cpu().double()
    return _roles(_runs(samples[0] if samples.ndim == 3 else samples) or [])


def _grids(ids_ND: Tensor, roles: tuple[int, int] | None) -> tuple[Sizes, ...] | None:
    runs = _runs(ids_ND)
    one_each = len(ids_ND) > 1 and runs is not None and len(runs) == len(ids_ND)  # every token an image of its own: no positions
    if runs is None or one_each or not _are_images(ids_ND, runs):
        return None
    roles = roles or _roles(runs)
    return tuple(_oriented(run, roles) for run in runs)


def _roles(runs: list[_Grid]) -> tuple[int, int] | None:
    return next(((run.columns[-2], run.columns[-1]) for run in runs if len(run.columns) > 1), None)


def _are_images(ids_ND: Tensor, runs: list[_Grid]) -> bool:
    """Say whether runs of positions are images of their own, and not the pieces of one in another order, or of a part of one."""
    counting = sorted({column for run in runs for column in run.columns[-2:]})  # columns and rows: frames tell images apart too
    others = [column for column in range(ids_ND.shape[1]) if column not in counting]
    firsts = ids_ND[[sum(math.prod(run.sizes) for run in runs[:i]) for i in range(len(runs))]]
    names = [tuple(first) for first in firsts[:, others].tolist()]
    groups = [name for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
    if len(set(groups)) < len(groups):
        return False
    origins: dict[tuple[float, ...], list[float]] = {}
    return all(origins.setdefault(name, origin) == origin for name, origin in zip(names, firsts[:, counting].tolist(), strict=True))


def _oriented(run: _Grid, roles: tuple[int, int] | None) -> Sizes:
    """Return sizes with rows and columns both, where a run along one dimension shows only one of them."""
    if len(run.sizes) >= 2:
        return run.sizes
    length = math.prod(run.sizes)
    is_column = roles is not None and run.columns == (roles[0],)
    return (length, 1) if is_column else (1, length)


def _runs(ids_ND: Tensor) -> list[_Grid] | None:
    """Cut positions into full grids, each as long as it can be; None if there are far too many for images."""
    runs: list[_Grid] = []
    start = 0
    while start < len(ids_ND):
        run = _leading_grid(ids_ND[start:])
        runs.append(run)
        start += math.prod(run.sizes)
        if len(runs) > MAX_IMAGES:
            return None
    return runs


def _leading_grid(ids_ND: Tensor, dims: int = MAX_GRID_DIMS) -> _Grid:
    """Find the longest full grid that positions begin with: blocks of one dimension more, as long as they repeat in even steps."""
    sizes: list[int] = []
    columns: list[int] = []
    block = 1  # tokens that the dimensions found so far hold
    while len(sizes) < dims:
        count, column = _repetitions(ids_ND, block, columns)
        if len(sizes) == 2 and count > 1 and _leading_grid(ids_ND[(count - 1) * block :], 2).sizes != tuple(reversed(sizes)):
            count -= 1  # what looks like a last frame is the beginning of a larger image
        if count < 2:
            break
        sizes.append(count)
        columns.append(column)
        block *= count
    return _Grid(tuple(reversed(sizes)) or (1,), tuple(reversed(columns)))


def _repetitions(ids_ND: Tensor, block: int, taken: list[int]) -> tuple[int, int]:
    """Count how often the first `block` positions repeat, moved along one column in even steps; and tell that column.

    Columns that hold the same as another (h, w, h, w) move with it. Frames may be at uneven times.
    """
    whole = len(ids_ND) // block
    if whole < 2:
        return 1, -1
    blocks = ids_ND[: whole * block].reshape(whole, block, -1)
    steps = blocks[1:] - blocks[:-1]  # (blocks - 1, block, D)
    first = steps[0, 0]
    moving = first != 0
    changed = moving.nonzero().flatten().tolist()
    if not changed or any(column in taken for column in changed) or bool((first[changed] / first[changed[0]] <= 0).any()):
        return 1, -1
    along = steps / torch.where(moving, first, torch.ones_like(first))  # in units of the first step
    uneven = len(taken) == MAX_GRID_DIMS - 1
    even = torch.where(moving, (along > 0) & (uneven | ((along - 1).abs() <= MAX_UNEVENNESS)), along == 0)
    fits = even.flatten(1).all(1)
    return (whole if bool(fits.all()) else int((~fits).nonzero()[0]) + 1), changed[0]
