"""The demo models' text encoder: fixed and seeded, so that nothing has to be trained or downloaded.

A trained encoder gives a diffusion transformer each word in its context. Here that is the word's own vector, its
position's, and the sum of its neighbours' vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from edit_compile.demo import groups, motion, shapes

TEXT_LENGTH, GROUP_TEXT_LENGTH = 32, 40
_WORD_CHANNELS, _POSITION_CHANNELS = 48, 32
TEXT_CHANNELS = 2 * _WORD_CHANNELS + _POSITION_CHANNELS
_NEIGHBOURS = 4
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
_MOTION_TEMPLATE_WORDS = ("a", "moves", "on", "background")
MOTION_VOCABULARY = (  # of the video model
    PADDING,
    *_MOTION_TEMPLATE_WORDS,
    *motion.DIRECTIONS,
    *motion.SPEEDS,
    *shapes.COLOURS,
    *shapes.SHAPES,
    *shapes.BACKGROUNDS,
)
_GROUP_TEMPLATE_WORDS = ("a", "picture", "with", "background", "showing", "in", "the", "part", "and")
GROUP_VOCABULARY = (  # of the 64 px models
    PADDING,
    *_GROUP_TEMPLATE_WORDS,
    *("upper", "lower", "left", "right"),
    *groups.COUNTS,
    *groups.SIZES,
    *groups.TEXTURES,
    *shapes.COLOURS,
    *shapes.SHAPES,
    *groups.PLURALS.values(),
    *shapes.BACKGROUNDS,
)
_ALL_WORDS = tuple(
    dict.fromkeys((*VOCABULARY, *MOTION_VOCABULARY, *GROUP_VOCABULARY))
)  # a word's place decides its vector: new ones come last


def encode(captions: Sequence[str], vocabulary: Sequence[str] = VOCABULARY, length: int = TEXT_LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    """Encode B captions as (tokens, pooled, mask): (B, length, 128), (B, 128), and (B, length) of 1 for words and 0 for padding.

    A token is its word's vector, the sum of the vectors of the words at most four places away, and its position's
    sinusoids. The empty caption, all padding, is the unconditional one.

    Raises:
        ValueError: a caption has a word outside `vocabulary`, or too many words.
    """
    index = {word: i for i, word in enumerate(_ALL_WORDS)}
    rows = []
    for text in captions:
        words = text.lower().replace(",", " ").replace(".", " ").split()
        unknown = [word for word in words if word not in vocabulary]
        if unknown:
            known = ", ".join(word for word in vocabulary if word != PADDING)
            raise ValueError(f"this demo model does not know {unknown} in {text!r}; it knows: {known}")
        if len(words) > length:
            raise ValueError(f"this demo model reads {length} words at most, {text!r} has {len(words)}")
        rows.append([index[word] for word in words] + [0] * (length - len(words)))
    ids = torch.tensor(rows)
    mask = (ids != 0).float()
    table = torch.randn(len(_ALL_WORDS), _WORD_CHANNELS, generator=torch.Generator().manual_seed(0))
    words_BTE = table[ids]
    window = torch.ones(_WORD_CHANNELS, 1, 2 * _NEIGHBOURS + 1)
    spoken_BET = (words_BTE * mask[..., None]).mT
    context_BTE = functional.conv1d(spoken_BET, window, padding=_NEIGHBOURS, groups=_WORD_CHANNELS).mT
    positions_BTE = _sinusoids(length, _POSITION_CHANNELS).expand(len(rows), -1, -1)
    tokens = torch.cat([words_BTE, context_BTE / _NEIGHBOURS**0.5, positions_BTE], -1)
    return tokens, (tokens * mask[..., None]).sum(1) / length**0.5, mask


def _sinusoids(length: int, channels: int) -> Tensor:
    """Encode positions as (length, channels)."""
    frequencies = torch.exp(torch.linspace(0, -5, channels // 2))
    angles = torch.arange(length)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)
