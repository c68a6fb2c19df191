"""Image tokens as images and back, and sampling what is indexed by token on a thinned grid.

The grid of a call comes as the *shape* of a tensor, which torch.compile keeps symbolic where integers held by a module
would recompile at every resolution; several images in one sequence have a tuple of them, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from edit_compile.errors import GridError

Grids = Tensor | tuple[Tensor, ...]  # the grid of the image, or of each image, as the shapes of tensors


def grids_of(grid: Grids) -> tuple[tuple[int, ...], ...]:
    """Return the sizes of each image's grid."""
    return (tuple(grid.shape),) if isinstance(grid, Tensor) else tuple(tuple(each.shape) for each in grid)


def image_tokens(grid: Grids) -> int:
    """Count the positions of all grids."""
    return sum(math.prod(sizes) for sizes in grids_of(grid))


def in_words(grids: Sequence[Sequence[int]]) -> str:
    """Write grids for an error: 6 x 10 + 8 x 4."""
    return " + ".join(" x ".join(map(str, sizes)) for sizes in grids)


def to_image(x_BNC: Tensor, grid: Sequence[int]) -> Tensor:
    """View tokens (B, N, C) as an image (B, C, *grid), channels last in memory.

    Raises:
        GridError: the grid does not have N positions.
    """
    if math.prod(grid) != x_BNC.shape[1]:
        raise GridError(f"{x_BNC.shape[1]} image tokens do not fill a grid of {in_words([grid])} = {math.prod(grid)}")
    image: Tensor = torch.unflatten(x_BNC, 1, tuple(grid)).movedim(-1, 1)
    return image


def to_tokens(x_BCG: Tensor) -> Tensor:
    """View an image (B, C, *grid) as tokens (B, N, C)."""
    return x_BCG.flatten(2).transpose(1, 2)


def image_span(length: int, grid: Grids, before: int | None, after: int | None) -> tuple[int, int]:
    """Return the first and last-plus-one position of the image in an axis of `length` tokens.

    Args:
        before, after: numbers of tokens before and after the image, one of which may be None for what remains.
    """
    image = image_tokens(grid)
    start = before if before is not None else length - image - (after or 0)
    return start, start + image


def cut_image(x: Tensor, dim: int, grid: Grids, before: int | None, after: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a token axis into the tokens before the image, the image's, and those after it, along `dim`.

    Raises:
        GridError: there are image tokens alone, and not as many as the grid has positions.
    """
    length = x.shape[dim]
    start, stop = image_span(length, grid, before, after)
    if before == 0 and after == 0 and stop != length:
        raise GridError(f"{length} image tokens do not fill a grid of {in_words(grids_of(grid))} = {stop - start}")
    return x.narrow(dim, 0, start), x.narrow(dim, start, stop - start), x.narrow(dim, stop, length - stop)


def aligned(stride: Sequence[int], dims: int) -> tuple[int, ...]:
    """Return a stride's step in each of `dims` dimensions of a grid: the last ones are its own, an image is one frame of a video."""
    return (*(1,) * (dims - len(stride)), *stride[max(0, len(stride) - dims) :])


def sample_axis(x: Tensor, dim: int, grid: Grids, before: int | None, after: int | None, stride: Sequence[int]) -> Tensor:
    """Sample a table by token, RoPE's or a mask, at the window centres of a tap with that stride; other tokens stay.

    (..., before + prod(grid) + after, ...) to (..., before + prod(ceil(grid / stride)) + after, ...) along `dim`. See `aligned`.
    """
    front, image, back = cut_image(x, dim, grid, before, after)
    sampled = [_sampled(each, dim, sizes, stride) for each, sizes in _each_image(image, dim, grid)]
    parts = [*sampled, *([front, back] if (before, after) != (0, 0) else [])]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([front, *sampled, back] if len(parts) > len(sampled) else sampled, dim)


def _sampled(image: Tensor, dim: int, sizes: Sequence[int], stride: Sequence[int]) -> Tensor:
    sampled: Tensor = torch.unflatten(image, dim, tuple(sizes))
    for axis, step in enumerate(aligned(stride, len(sizes))):
        sampled = sampled.transpose(0, dim + axis)[::step].transpose(0, dim + axis) if step > 1 else sampled
    return sampled.flatten(dim, dim + len(sizes) - 1)


def _each_image(x: Tensor, dim: int, grid: Grids) -> list[tuple[Tensor, tuple[int, ...]]]:
    """Cut the image tokens along `dim` into each image's, with its grid."""
    grids = grids_of(grid)
    if len(grids) == 1:
        return [(x, grids[0])]
    starts = [sum(math.prod(sizes) for sizes in grids[:i]) for i in range(len(grids))]
    return [(x.narrow(dim, start, math.prod(sizes)), sizes) for start, sizes in zip(starts, grids, strict=True)]


def every_nth(x: Tensor, dim: int, grid: Grids, index: int, stride: Sequence[int]) -> Tensor:
    """Sample a table along the dimension `dim`, which is that of number `index` of the grid, as `sample_axis` samples all of them."""
    if not isinstance(grid, Tensor):
        raise GridError(f"the model lays its image tokens out on one grid here, not on the {len(grid)} grids {in_words(grids_of(grid))}")
    step = aligned(stride, grid.ndim)[index]
    return x.transpose(0, dim)[::step].transpose(0, dim) if step > 1 else x


def dropped_tokens(grid: Grids, stride: Sequence[int]) -> int:
    """Count by how many image tokens a thinned grid has fewer."""
    kept = 0
    for sizes in grids_of(grid):
        # A list: dynamo cannot trace a generator here.
        lengths = [(n + step - 1) // step for n, step in zip(sizes, aligned(stride, len(sizes)), strict=True)]
        kept += math.prod(lengths)
    return image_tokens(grid) - kept


def window_counts(grid: Sequence[int], stride: Sequence[int], like: Tensor) -> Tensor:
    """Count the tokens of each window that a tap with that stride makes one token of, (prod(ceil(grid / stride)),) in float32 or higher.

    A window that the grid does not fill has fewer: 5 rows by steps of 2 are windows of 2, 2 and 1.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    counts = torch.ones((), dtype=dtype, device=like.device)
    for n, step in zip(grid, aligned(stride, len(grid)), strict=True):
        left = n - step * torch.arange((n + step - 1) // step, dtype=dtype, device=like.device)
        counts = counts.unsqueeze(-1) * left.clamp(max=step)
    return counts.flatten()


def on_images(module: torch.nn.Module, x_BNC: Tensor, grid: Grids) -> Tensor:
    """Call a module that maps images on tokens, on each image by itself: (B, N, C) to (B, N', C).

    Raises:
        GridError: the grids do not have N positions.
    """
    if image_tokens(grid) != x_BNC.shape[1]:
        raise GridError(f"{x_BNC.shape[1]} image tokens do not fill a grid of {in_words(grids_of(grid))} = {image_tokens(grid)}")
    mapped = [to_tokens(module(to_image(tokens, sizes))) for tokens, sizes in _each_image(x_BNC, 1, grid)]
    return mapped[0] if len(mapped) == 1 else torch.cat(mapped, 1)
