"""Data of kind `cached`: latents and text embeddings that `edit-compile cache` has computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from edit_compile.adapters.denoise import misfit
from edit_compile.adapters.encoders import make_decoder, other_conditions, stacked
from edit_compile.distillation.data.buckets import Shape
from edit_compile.distillation.data.cache.format import CAPTIONS, EMPTY, IMAGES, INDEX, CachedSample, read_index, read_part, resolution_key
from edit_compile.distillation.data.captioned_images import Share
from edit_compile.distillation.data.encoding import as_floats
from edit_compile.distillation.data.map_style import MapStyleSource
from edit_compile.distillation.data.records import BadSample, fingerprint_of
from edit_compile.distillation.data.registry import DataConfig, register_data
from edit_compile.distillation.data.source import Batch, DataSource, SourceContext
from edit_compile.errors import DistillError


@register_data("cached")
class CachedData(DataConfig):
    """A cache."""

    kind: Literal["cached"]
    path: Path
    """The folder that `edit-compile cache` has written."""
    caption_dropout: Share = 0.1
    """The share of samples trained with the empty caption, which guidance needs."""
    held_out: PositiveInt | None = None
    """The number of samples that are never trained on. Default: a fiftieth of them, 8 to 256."""

    def check_files(self, model: nn.Module) -> None:
        """Compare the first sample with what the model takes."""
        cached = CachedDataset(self.path, model)
        try:
            resolution = cached.index.resolutions[0]
            shape = cached.shape(0, resolution)
            sample = cached.collate([cached.get(0, shape, resolution, 0)], shape)
        except (BadSample, IndexError):  # what is damaged is skipped when it is trained on, and an empty cache is refused then
            return
        problem = misfit(model, sample.latents, sample.conditions)
        if problem is not None:
            raise DistillError(f"data.path: {self.path} was made for another model: {problem}; make it again")

    def open(self, context: SourceContext) -> DataSource:
        """Open the cache."""
        dataset = CachedDataset(self.path, context.model, make_decoder(context.base, context.device, context.dtype))
        return MapStyleSource(dataset, context.seed, self.held_out, self.caption_dropout, skipped=dict(dataset.index.skipped))


class CachedDataset:
    """The samples of a cache. Each is compared with its checksum when it is read."""

    def __init__(self, folder: Path, model: nn.Module, decoder: Callable[[Tensor], Tensor] | None = None) -> None:
        """
        Args:
            decoder: from latents to images in [0, 1]; without it they are not shown.

        Raises:
            DistillError: the folder has no finished cache, or one for another kind of model.
        """
        self.folder, self.model, self.decoder, self.index = folder, model, decoder, read_index(folder)
        if self.index.model != type(model).__name__:
            raise DistillError(f"data.path: {folder} was made for a {self.index.model}, but this model is a {type(model).__name__}")
        self.places = [(shard, number) for shard in self.index.shards for number in range(len(shard.samples))]
        try:
            self.empty_caption = read_part(folder / EMPTY, "", self.index.empty)
        except BadSample as error:
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
        return self._sample(index).images[resolution_key(resolution)].shape

    def get(self, index: int, shape: Shape, resolution: Shape, draw: int | None) -> tuple[Tensor, dict[str, Tensor], str]:
        shard, number = self.places[index]
        path, sample, key = self.folder / shard.file, shard.samples[number], resolution_key(resolution)
        (latents,) = read_part(path, f"{number}/{IMAGES}/{key}/", sample.images[key].digest).values()
        if draw is None:
            return latents, self.empty_caption, ""
        chosen = draw % len(sample.captions)
        caption = sample.captions[chosen]
        return latents, read_part(path, f"{number}/{CAPTIONS}/{chosen}/", caption.digest), caption.text

    def collate(self, samples: Sequence[tuple[Tensor, dict[str, Tensor], str]], shape: Shape) -> Batch:
        latents, captions, texts = zip(*samples, strict=True)
        conditions = stacked(captions) | other_conditions(self.model, shape, len(samples))
        return Batch(torch.stack(latents).float(), as_floats(conditions), texts)

    def decode(self, latents: Tensor) -> Tensor | None:
        return self.decoder(latents) if self.decoder is not None else None

    def fingerprint(self) -> str:
        return fingerprint_of([(self.folder / INDEX).read_text("utf-8")])

    def damaged(self) -> dict[str, str]:
        """Read all of the cache, and return every damaged sample by name, with the reason."""
        found = {}
        for index in range(len(self)):
            try:
                for resolution in self.index.resolutions:
                    for draw in range(len(self._sample(index).captions)):
                        self.get(index, self.shape(index, resolution), resolution, draw)
            except BadSample as reason:
                found[self.name(index)] = str(reason)
        return found

    def _sample(self, index: int) -> CachedSample:
        shard, number = self.places[index]
        return shard.samples[number]
