"""Data of kind `cached`: latents and text embeddings that `edit-compile cache` has computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from edit_compile.adapters.encoders import other_conditions, stacked
from edit_compile.distillation.data.buckets import Shape
from edit_compile.distillation.data.cache.format import CAPTIONS, EMPTY, PICTURES, read_index, read_part, resolution_key
from edit_compile.distillation.data.captioned import as_floats
from edit_compile.distillation.data.records import Unreadable
from edit_compile.distillation.data.source import Batch
from edit_compile.errors import DistillError
from edit_compile.frozen import Frozen


class CachedData(Frozen):
    """A cache.

    Attributes:
        path: the folder that `edit-compile cache` has written.
        caption_dropout: the share of samples whose caption is empty, which guidance needs.
        held_out: the number of samples that are never trained on. Default: a fiftieth of them, 8 to 256.
    """

    kind: Literal["cached"]
    path: Path
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    held_out: PositiveInt | None = None


class Cached:
    """The items of a cache. Each is checked against its checksum when it is read."""

    def __init__(self, folder: Path, model: nn.Module, decode: Callable[[Tensor], Tensor] | None = None) -> None:
        """
        Args:
            decode: latents to pictures in [0, 1]; without it they are not shown.

        Raises:
            DistillError: the folder holds no finished cache, or one for another kind of model.
        """
        self.folder, self.model, self.decode, self.index = folder, model, decode, read_index(folder)
        if self.index.model != type(model).__name__:
            raise DistillError(f"data.path: {folder} was made for a {self.index.model}, this model is a {type(model).__name__}")
        self.places = [(shard, number) for shard in self.index.shards for number in range(len(shard.samples))]
        try:
            self.empty = read_part(folder / EMPTY, "", self.index.empty)
        except Unreadable as error:
            raise DistillError(f"data.path: {error}; make the cache again") from error

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        shard, number = self.places[index]
        return f"{self.folder / shard.file}, sample {number} ({shard.samples[number].name})"

    def shape(self, index: int, resolution: Shape) -> Shape:
        if resolution not in self.index.resolutions:
            known = ", ".join(map(resolution_key, self.index.resolutions))
            raise DistillError(f"{self.folder} has no latents for {resolution_key(resolution)} pixels, only for {known}")
        shard, number = self.places[index]
        return shard.samples[number].pictures[resolution_key(resolution)].shape

    def get(self, index: int, shape: Shape, resolution: Shape, empty: bool) -> tuple[Tensor, dict[str, Tensor], str]:
        shard, number = self.places[index]
        path, sample, key = self.folder / shard.file, shard.samples[number], resolution_key(resolution)
        (latents,) = read_part(path, f"{number}/{PICTURES}/{key}/", sample.pictures[key].digest).values()
        if empty:
            return latents, self.empty, ""
        return latents, read_part(path, f"{number}/{CAPTIONS}/", sample.captions), sample.caption

    def collate(self, samples: Sequence[tuple[Tensor, dict[str, Tensor], str]], shape: Shape) -> Batch:
        latents, captions, texts = zip(*samples, strict=True)
        conditions = stacked(captions) | other_conditions(self.model, shape, len(samples))
        return Batch(torch.stack(latents).float(), as_floats(conditions), texts)

    def pixels(self, pictures: Tensor) -> Tensor | None:
        return self.decode(pictures) if self.decode is not None else None

    def damaged(self) -> dict[str, str]:
        """Every damaged sample by name, with the reason: all of the cache is read."""
        found = {}
        for index in range(len(self)):
            try:
                for resolution in self.index.resolutions:
                    self.get(index, self.shape(index, resolution), resolution, empty=False)
            except Unreadable as reason:
                found[self.name(index)] = str(reason)
        return found
