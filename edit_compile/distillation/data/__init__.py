"""Data for distillation: deterministic streams addressed by position.

A source answers a `Request` for some rows of one global batch. The answer is a function of the request alone, never of
earlier ones, and so are noise and timesteps (`distill.noise`), which the runner draws by position. That makes three
things trivial:

- resuming: the only state of the data is a number, the position;
- sharding: process r of n asks for its rows of the global batch, and all together see what one process would see;
- prefetching: requests may be answered ahead, in any thread.

A source of random access (`Indexed`, over files, shards with an index, a cache) shuffles by a permutation seeded per pass;
one that can only be read in order (`Streamed`) keeps its reader and, asked for what is behind it, opens it again and
skips. A sample that cannot be read is replaced by another that the position determines, and named in `skipped`.

To add a source: a module here with its section of the recipe (a `Frozen` with a literal `kind`) and its class, the
section in `Data`, the opener in `SOURCES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from edit_compile.distillation.data.opening import open_cache, open_pictures, open_prompts
from edit_compile.distillation.data.source import Batch, Origin, Request, Source, Split
from edit_compile.distillation.data.sources.cached import CachedData
from edit_compile.distillation.data.sources.hub import DatasetData
from edit_compile.distillation.data.sources.images import ImagesData
from edit_compile.distillation.data.sources.prompts import PromptsData
from edit_compile.distillation.data.sources.random import Random, RandomData
from edit_compile.distillation.data.sources.shapes import Shapes, ShapesData
from edit_compile.distillation.data.sources.tar_shards import TarData

Data = Annotated[ShapesData | ImagesData | DatasetData | TarData | PromptsData | CachedData | RandomData, Field(discriminator="kind")]

SOURCES: dict[str, Callable[[Any, Origin], Source]] = {
    "shapes": lambda data, origin: Shapes(data, origin.model, origin.seed),
    "images": open_pictures,
    "dataset": open_pictures,
    "webdataset": open_pictures,
    "prompts": open_prompts,
    "cached": open_cache,
    "random": lambda data, origin: Random(origin.model, origin.seed),
}

__all__ = ["SOURCES", "Batch", "Data", "Origin", "Request", "Source", "Split", "open_source"]


def open_source(
    data: Data,
    model: nn.Module,
    seed: int,
    *,
    base: str | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Source:
    """The source that a recipe's `data` section describes.

    Args:
        model: the transformer whose conditions are wanted; if it is converted, its teacher draws what has to be drawn.
        seed: of shuffling and of everything else that is random.
        base: where its pipeline is, for encoders: a folder, a hub id or a demo model's name.
        device, dtype: of the encoders. Default: the CPU.

    Raises:
        DistillError: the data cannot be opened, or the model's encoders not loaded.
    """
    return SOURCES[data.kind](data, Origin(model, seed, base, device or torch.device("cpu"), dtype))
