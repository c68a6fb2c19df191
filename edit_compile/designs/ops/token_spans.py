"""Where the image tokens are along a token axis, at run time: cutting them out, and sampling tables on the compressed grid.

A place is a pair (before, after): the numbers of tokens before and after the image, one of which may be None for
"whatever remains". The image's own number of tokens is h * w of the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor


def image_span(length: int, grid_hw: Tensor, before: int | None, after: int | None) -> tuple[int, int]:
    """First and last-plus-one position of the image in an axis of `length` tokens."""
    h, w = grid_hw.shape
    start = before if before is not None else length - h * w - (after or 0)
    return start, start + h * w


def cut_image(x: Tensor, dim: int, grid_hw: Tensor, before: int | None, after: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens before the image, the image's, and those after it, along `dim`.

    Raises:
        ValueError: the grid has more positions than there are tokens left for it.
    """
    length = x.shape[dim]
    start, stop = image_span(length, grid_hw, before, after)
    if before == 0 and after == 0 and stop != length:
        h, w = grid_hw.shape
        raise ValueError(f"{length} image tokens do not fill a grid of {h} x {w} = {h * w}")
    return x.narrow(dim, 0, start), x.narrow(dim, start, stop - start), x.narrow(dim, stop, length - stop)


def sample_axis(x: Tensor, dim: int, grid_hw: Tensor, before: int | None, after: int | None) -> Tensor:
    """A table by token, such as RoPE's or a mask, at the compressor's window centres; other tokens stay.

    (..., before + h*w + after, ...) to (..., before + ceil(h/2)*ceil(w/2) + after, ...) along `dim`.
    """
    h, w = grid_hw.shape
    front, image, back = cut_image(x, dim, grid_hw, before, after)
    sampled = image.unflatten(dim, (h, w)).transpose(0, dim)[::2].transpose(0, dim)
    sampled = sampled.transpose(0, dim + 1)[::2].transpose(0, dim + 1).flatten(dim, dim + 1)
    if before == 0 and after == 0:
        return sampled
    return torch.cat([front, sampled, back], dim)
