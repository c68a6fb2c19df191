"""Image tokens as images and back, and sampling what is indexed by token on a thinned grid.

The grid of a call comes as the *shape* of a tensor, which torch.compile keeps symbolic where integers held by a module
would recompile at every resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def to_image(x_BNC: Tensor, grid: Sequence[int]) -> Tensor:
    """View tokens (B, N, C) as an image (B, C, *grid), channels last in memory.

    Raises:
        ValueError: the grid does not have N positions.
    """
    if math.prod(grid) != x_BNC.shape[1]:
        raise ValueError(f"{x_BNC.shape[1]} image tokens do not fill a grid of {' x '.join(map(str, grid))} = {math.prod(grid)}")
    image: Tensor = torch.unflatten(x_BNC, 1, tuple(grid)).movedim(-1, 1)
    return image


def to_tokens(x_BCG: Tensor) -> Tensor:
    """View an image (B, C, *grid) as tokens (B, N, C)."""
    return x_BCG.flatten(2).transpose(1, 2)


def image_span(length: int, grid: Tensor, before: int | None, after: int | None) -> tuple[int, int]:
    """Return the first and last-plus-one position of the image in an axis of `length` tokens.

    Args:
        before, after: numbers of tokens before and after the image, one of which may be None for what remains.
    """
    image = math.prod(grid.shape)
    start = before if before is not None else length - image - (after or 0)
    return start, start + image


def cut_image(x: Tensor, dim: int, grid: Tensor, before: int | None, after: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a token axis into the tokens before the image, the image's, and those after it, along `dim`.

    Raises:
        ValueError: there are image tokens alone, and not as many as the grid has positions.
    """
    length = x.shape[dim]
    start, stop = image_span(length, grid, before, after)
    if before == 0 and after == 0 and stop != length:
        raise ValueError(f"{length} image tokens do not fill a grid of {' x '.join(map(str, grid.shape))} = {stop - start}")
    return x.narrow(dim, 0, start), x.narrow(dim, start, stop - start), x.narrow(dim, stop, length - stop)


def aligned(stride: Sequence[int], dims: int) -> tuple[int, ...]:
    """Return a stride's step in each of `dims` dimensions of a grid: the last ones are its own, an image is one frame of a video."""
    return (*(1,) * (dims - len(stride)), *stride[max(0, len(stride) - dims) :])


def sample_axis(x: Tensor, dim: int, grid: Tensor, before: int | None, after: int | None, stride: Sequence[int]) -> Tensor:
    """Sample a table by token, RoPE's or a mask, at the window centres of a tap with that stride; other tokens stay.

    (..., before + prod(grid) + after, ...) to (..., before + prod(ceil(grid / stride)) + after, ...) along `dim`. See `aligned`.
    """
    front, image, back = cut_image(x, dim, grid, before, after)
    sampled = torch.unflatten(image, dim, tuple(grid.shape))
    for axis, step in enumerate(aligned(stride, grid.ndim)):
        sampled = sampled.transpose(0, dim + axis)[::step].transpose(0, dim + axis) if step > 1 else sampled
    sampled = sampled.flatten(dim, dim + grid.ndim - 1)
    if before == 0 and after == 0:
        return sampled
    return torch.cat([front, sampled, back], dim)


def every_nth(x: Tensor, dim: int, grid: Tensor, index: int, stride: Sequence[int]) -> Tensor:
    """Sample a table along the dimension `dim`, which is that of number `index` of the grid, as `sample_axis` samples all of them."""
    step = aligned(stride, grid.ndim)[index]
    return x.transpose(0, dim)[::step].transpose(0, dim) if step > 1 else x


def dropped_tokens(grid: Tensor, stride: Sequence[int]) -> int:
    """Count by how many image tokens a thinned grid has fewer."""
    steps = aligned(stride, grid.ndim)
    return math.prod(grid.shape) - math.prod((n + step - 1) // step for n, step in zip(grid.shape, steps, strict=True))


def on_images(module: torch.nn.Module, x_BNC: Tensor, grid: Tensor) -> Tensor:
    """Call a module that maps images on tokens: (B, N, C) to (B, N', C)."""
    image: Tensor = module(to_image(x_BNC, grid.shape))
    return to_tokens(image)
