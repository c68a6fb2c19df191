"""The demo models' text encoder: a fixed, seeded table of word vectors, so that nothing has to be trained or downloaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edit_compile.demo import shapes

TEXT_LENGTH = 32
TEXT_CHANNELS = 64
PADDING = "."
_TEMPLATE_WORDS = ("a", "picture", "with", "background", "showing", "in", "the", "part", "and", "of", "nothing", "else")
VOCABULARY = (
    PADDING,
    *_TEMPLATE_WORDS,
    *("upper", "lower", "left", "right"),
    *shapes.SIZES,
    *shapes.COLOURS,
    *shapes.SHAPES,
    *shapes.BACKGROUNDS,
)


def encode(captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Captions to (tokens, pooled, mask): (B, 32, 64), (B, 64) and (B, 32) of 1 for words and 0 for padding.

    The first half of a token is its word's vector, the second half its position's (sinusoidal). The empty
    caption, all padding, is the unconditional one.

    Raises:
        ValueError: a caption has a word outside `VOCABULARY`, or too many words.
    """
    index = {word: i for i, word in enumerate(VOCABULARY)}
    rows = []
    for text in captions:
        words = text.lower().replace(",", " ").replace(".", " ").split()
        unknown = [word for word in words if word not in index]
        if unknown:
            raise ValueError(f"the demo models do not know {unknown} in {text!r}; they know: {', '.join(VOCABULARY[1:])}")
        if len(words) > TEXT_LENGTH:
            raise ValueError(f"the demo models read {TEXT_LENGTH} words at most, {text!r} has {len(words)}")
        rows.append([index[word] for word in words] + [0] * (TEXT_LENGTH - len(words)))
    ids = torch.tensor(rows)
    half = TEXT_CHANNELS // 2
    table = torch.randn(len(VOCABULARY), half, generator=torch.Generator().manual_seed(0))
    words_BTE = table[ids]
    positions_BTE = _sinusoids(TEXT_LENGTH, half).expand(len(rows), -1, -1)
    mask = (ids != 0).float()
    pooled = torch.cat([(words_BTE * mask[..., None]).sum(1), (words_BTE * positions_BTE * mask[..., None]).sum(1)], -1)
    return torch.cat([words_BTE, positions_BTE], -1), pooled / TEXT_LENGTH**0.5, mask


def _sinusoids(length: int, channels: int) -> Tensor:
    frequencies = torch.exp(torch.linspace(0, -5, channels // 2))
    angles = torch.arange(length)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)
