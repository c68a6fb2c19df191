"""Data for distillation: deterministic streams addressed by position.

A source answers a `Request` for some rows of one global batch. The answer is a function of the request alone, never of
earlier ones, and so are noise and timesteps (`distill.noise`), which the runner draws by position. That makes three
things trivial:

- resuming: the only state of the data is a number, the position;
- sharding: process r of n asks for its rows of the global batch, and all together see what one process would see;
- prefetching: requests may be answered ahead, in any thread.

A source of random access (files, shards with an index) shuffles by a permutation seeded per epoch; one that can only be
read in order (a streamed data set) keeps its reader and, asked for another position than the next, opens it again and
skips. A sample that cannot be read is replaced by another that the position determines, and named in `skipped`.

To add a source: a module here with its section of the recipe (a `Section` with a literal `kind`) and its class, the
section in `Data`, the opener in `SOURCES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from edit_compile.distill.data.shapes import Shapes, ShapesData
from edit_compile.distill.data.source import Batch, Request, Source, Split

Data = ShapesData

SOURCES: dict[str, Callable[[Any, nn.Module, int], Source]] = {"shapes": Shapes}

__all__ = ["SOURCES", "Batch", "Data", "Request", "Source", "Split", "open_source"]


def open_source(data: Data, model: nn.Module, seed: int) -> Source:
    """The source that a recipe's `data` section describes.

    Args:
        model: the transformer whose conditions are wanted.
        seed: of shuffling and of everything else that is random.
    """
    return SOURCES[data.kind](data, model, seed)
