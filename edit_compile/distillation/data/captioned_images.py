"""Captioned images, encoded as they are needed, in buckets of aspect ratios: what several kinds of data have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from edit_compile.adapters.encoders import check_encoder
from edit_compile.distillation.data.buckets import Buckets, Shape, bucket_shapes, nearest_shape
from edit_compile.distillation.data.cache.encode import ImageProducer, records_from
from edit_compile.distillation.data.cache.write import Producer
from edit_compile.distillation.data.decode_image import size_of
from edit_compile.distillation.data.encoding import Encoder, encode, encoder_for, prepare
from edit_compile.distillation.data.map_style import MapStyleSource
from edit_compile.distillation.data.records import BadSample, RecordDataset
from edit_compile.distillation.data.registry import DataConfig
from edit_compile.distillation.data.source import Batch, DataSource, SourceContext

FREE_IN_CACHES: dict[str, Any] = {"cache": "free"}  # marks a field that may be chosen anew when a cache is read
Share = Annotated[float, Field(ge=0, le=1)]


class CaptionedImages(DataConfig):
    """The options that all data of captioned images have in common."""

    buckets: Buckets | None = Buckets()
    """Aspect ratios; null to crop every image to the stage's resolution."""
    text_tokens: PositiveInt | None = None
    """The longest caption, in tokens of the pipeline's longest encoder. Default: the pipeline's own."""
    caption_dropout: Share = Field(default=0.1, json_schema_extra=FREE_IN_CACHES)
    """The share of samples trained with the empty caption, which guidance needs."""
    held_out: PositiveInt | None = Field(default=None, json_schema_extra=FREE_IN_CACHES)
    """The number of samples that are never trained on. Default: a fiftieth of them, 8 to 256."""

    def records(self, skipped: dict[str, str]) -> RecordDataset:
        """Open the records; what turns out to be unreadable before any of them is asked for is added to `skipped`.

        Raises:
            DistillError: there are none.
        """
        raise NotImplementedError

    def check_model(self, model: nn.Module, base: str | None) -> None:
        """Accept a model if its images and captions can be encoded."""
        check_encoder(model, base)

    def open(self, context: SourceContext) -> DataSource:
        """Open a source with random access."""
        skipped: dict[str, str] = {}
        dataset = EncodedImages(self.records(skipped), encoder_for(context, self.text_tokens), self.buckets)
        return MapStyleSource(dataset, context.seed, self.held_out, self.caption_dropout, skipped=skipped)

    def producer(self, context: SourceContext, batch_size: int) -> Producer:
        """Return what encodes the records for a cache."""
        skipped: dict[str, str] = {}
        records = self.records(skipped)
        encoder = encoder_for(context, self.text_tokens)
        return ImageProducer(
            lambda start: records_from(records, start),
            encoder,
            self.buckets,
            batch_size,
            records.fingerprint,
            skipped,
            number=len(records),
        )


class EncodedImages:
    """The samples of a dataset of records: images fitted to their shapes, with captions, encoded batch by batch."""

    def __init__(self, records: RecordDataset, encoder: Encoder, buckets: Buckets | None) -> None:
        self.records, self.encoder, self.buckets = records, encoder, buckets
        self._sizes: dict[int, Shape | BadSample] = {}

    def __len__(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        return self.records.name(index)

    def shape(self, index: int, resolution: Shape) -> Shape:
        shapes = bucket_shapes(*resolution, self.encoder.granularity, self.buckets)
        return shapes[0] if len(shapes) == 1 else nearest_shape(self._size(index), shapes)

    def _size(self, index: int) -> Shape:
        if index not in self._sizes:
            try:
                self._sizes[index] = size_of(self.records.record(index))
            except BadSample as reason:
                self._sizes[index] = reason
        size = self._sizes[index]
        if isinstance(size, BadSample):
            raise size
        return size

    def fingerprint(self) -> str:
        return self.records.fingerprint()

    def get(self, index: int, shape: Shape, resolution: Shape, draw: int | None) -> tuple[Tensor, str]:
        return prepare(self.records.record(index), shape, self.encoder, draw)

    def collate(self, samples: Sequence[tuple[Tensor, str]], shape: Shape) -> Batch:
        return encode(self.encoder, samples, shape)

    def decode(self, latents: Tensor) -> Tensor:
        return self.encoder.decode(latents)
