"""What a tiny configuration is: how to make a small random model of a class, inputs for it at any size, and what is right for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Size(NamedTuple):
    """The sizes of one forward; height, width and frames are counted in image tokens."""

    batch: int
    height: int
    width: int
    text: int
    frames: int

    @property
    def tokens(self) -> int:
        return self.height * self.width


SIZES = (Size(2, 6, 10, 7, 3), Size(3, 8, 5, 11, 4))  # of the example, and of a second forward at another resolution and aspect
STILL = (SIZES[0]._replace(frames=1), SIZES[1]._replace(frames=1))  # images that are videos of one frame
HEADS, HEAD_DIM, TEXT_DIM, POOLED_DIM = 3, 16, 24, 28
WIDTH = HEADS * HEAD_DIM
CHANNELS, PACKED, VIDEO = 4, 12, 8  # of latents, of packed latents, of video latents
ATTENTION: dict[str, Any] = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}

REWRITE, KEEP = "rewrite", "keep"
TEXT = "keep: no image tokens"
CROSS = "keep: cross-attention"
POOLING = "keep: the image tokens are keys and values only"
LINEAR, CHANNEL_ATTENTION = "keep: already linear", "keep: attention between channels"
EITHER = "rewrite|keep"  # left as it is, or rewritten: both are right

Inputs = Callable[[Size], dict[str, Any]]


@dataclass(frozen=True)
class Configuration:
    """A tiny model of one class and what is right for it.

    Attributes:
        name: the class, then a variant after a slash, if there are several.
        group: the heading it is listed under.
        model, inputs: make the model, and the keyword arguments of a forward of a given size.
        sites: by pattern of paths, the first that matches: "rewrite", "keep", both with a bar between where both are right, or
            "keep: " and a regular expression that the reason shown must match. Decided by reading the model.
        stated: whether nothing in the inputs tells the grid, so that the caller has to state it.
        dimensions: of the grid, 3 for video.
        sizes: of the example and of the second forward.
        note: what is special about the class, for the reader of the table.
        error: a regular expression; where it is not empty, an error of `plan` that matches it is right.
    """

    name: str
    group: str
    model: Callable[[], nn.Module]
    inputs: Inputs
    sites: dict[str, str] = field(default_factory=lambda: {"*": REWRITE})
    stated: bool = False
    dimensions: int = 2
    sizes: tuple[Size, Size] = SIZES
    note: str = ""
    error: str = ""


CONFIGURATIONS: dict[str, Configuration] = {}


def configuration(group: str, inputs: Inputs, sites: dict[str, str] | None = None, *, name: str = "", **more: Any) -> Callable[..., Any]:
    """Enter the decorated function, which makes a model, under its own name (two underscores begin a variant)."""

    def enter(model: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        called = name or model.__name__.replace("__", "/")
        CONFIGURATIONS[called] = Configuration(called, group, model, inputs, sites or {"*": REWRITE}, **more)
        return model

    return enter


def make(build: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """Make a seeded model in eval mode whose constant parameters (zero gates, unit norms) are made random, so that no path is dead."""
    torch.manual_seed(0)
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # parameters that are left uninitialized are NaN then, not what lay there
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return lively(build(**options).eval())
    finally:
        torch.use_deterministic_algorithms(was_deterministic)


def lively(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if not parameter.isfinite().all() or (parameter.numel() and parameter.abs().max() > 1e4):
                parameter.copy_(noise)
            elif parameter.numel() and (parameter == parameter.flatten()[0]).all():
                parameter.add_(noise, alpha=0.1)
    return model


# ---------------------------------------------------------------------------------------------- inputs


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents(size: Size, channels: int = CHANNELS, patch: int = 2) -> Tensor:
    return normal(size.batch, channels, patch * size.height, patch * size.width)


def video(size: Size, channels: int = VIDEO, patch: int = 2) -> Tensor:
    return normal(size.batch, channels, size.frames, patch * size.height, patch * size.width)


def text(size: Size, channels: int = TEXT_DIM, length: int | None = None, seed: int = 3) -> Tensor:
    return normal(size.batch, size.text if length is None else length, channels, seed=seed)


def text_mask(size: Size, dtype: torch.dtype = torch.long, length: int | None = None) -> Tensor:
    """As a tokenizer makes it: all prompts but the first are shorter and padded on the right."""
    length = size.text if length is None else length
    mask = torch.ones(size.batch, length, dtype=dtype)
    mask[1:, length // 2 + 1 :] = 0
    return mask


def steps(size: Size, scale: float = 1000.0) -> Tensor:
    return torch.linspace(0.25, 0.75, size.batch) * scale


def positions(size: Size, columns: str = "thw", frames: int = 1) -> Tensor:
    """(frames * tokens, columns) position ids, row-major; a column that is none of t, h and w is zero."""
    ranges = (torch.arange(float(frames)), torch.arange(float(size.height)), torch.arange(float(size.width)))
    found = dict(zip("thw", torch.meshgrid(*ranges, indexing="ij"), strict=True))
    return torch.stack([found.get(column, torch.zeros_like(found["t"])) for column in columns], -1).flatten(0, 2)


def tuples(**more: Any) -> dict[str, Any]:
    return {**more, "return_dict": False}
