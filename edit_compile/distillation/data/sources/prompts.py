"""Data of kind `prompts`: captions from a text file, and no images at all: the teacher samples them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from edit_compile.adapters.encoders import check_encoder
from edit_compile.adapters.sampling import LatentSampler, make_sampler
from edit_compile.api import teacher
from edit_compile.distillation.data.buckets import Buckets, Shape, bucket_shapes
from edit_compile.distillation.data.cache.encode import by_shape, encode_captions
from edit_compile.distillation.data.cache.write import Encoded, Producer
from edit_compile.distillation.data.captioned_images import FREE_IN_CACHES, Share
from edit_compile.distillation.data.encoding import Encoder, as_floats, encoder_for
from edit_compile.distillation.data.map_style import MapStyleSource
from edit_compile.distillation.data.records import BadSample, fingerprint_of
from edit_compile.distillation.data.registry import DataConfig, register_data
from edit_compile.distillation.data.seeding import seed_of
from edit_compile.distillation.data.source import Batch, DataSource, SourceContext
from edit_compile.errors import DistillError
from edit_compile.files import prompt_lines
from edit_compile.progress import each
from edit_compile.student.site import converted_sites


@register_data("prompts")
class PromptsData(DataConfig):
    """Captions whose images the teacher samples, at many forwards an image: `edit-compile cache` does it once."""

    kind: Literal["prompts"]
    path: Path
    """A text file with a caption per line; empty lines do not count."""
    samples_per_prompt: PositiveInt = 1
    """Images per caption, each from noise of its own."""
    steps: PositiveInt | None = None
    """Of the pipeline's sampler. Default: the pipeline's own."""
    guidance: Annotated[float, Field(ge=0)] | None = None
    """The guidance scale. Default: the pipeline's own."""
    buckets: Buckets | None = None
    """Aspect ratios, chosen evenly for the samples; null for the stage's resolution alone."""
    text_tokens: PositiveInt | None = None
    """The longest caption, in tokens of the pipeline's longest encoder. Default: the pipeline's own."""
    caption_dropout: Share = Field(default=0.1, json_schema_extra=FREE_IN_CACHES)
    """The share of samples trained with the empty caption, which guidance needs."""
    held_out: PositiveInt | None = Field(default=None, json_schema_extra=FREE_IN_CACHES)
    """The number of samples that are never trained on. Default: a fiftieth of them, 8 to 256."""

    sampled_by_teacher: ClassVar[bool] = True

    def check_model(self, model: nn.Module, base: str | None) -> None:
        """Accept a model if its captions can be encoded."""
        check_encoder(model, base)

    def check_files(self, model: nn.Module) -> None:
        """Read the prompts."""
        read_prompts(self.path)

    def open(self, context: SourceContext) -> DataSource:
        """Open a source that samples while the model trains, in the same thread."""
        return MapStyleSource(self.dataset(context), context.seed, self.held_out, self.caption_dropout, concurrent=False)

    def producer(self, context: SourceContext, batch_size: int) -> Producer:
        """Return what samples and encodes for a cache."""
        return PromptProducer(self.dataset(context), batch_size)

    def dataset(self, context: SourceContext) -> PromptDataset:
        """Open the prompts, with an encoder and a sampler."""
        named = {"num_inference_steps": self.steps, "guidance_scale": self.guidance, "max_sequence_length": self.text_tokens}
        options = {name: value for name, value in named.items() if value is not None}
        encoder = encoder_for(context, self.text_tokens)
        sample = make_sampler(context.model, context.base, context.device, context.dtype, options)
        return PromptDataset(self, context.model, encoder, sample, context.seed)


def read_prompts(path: Path) -> list[str]:
    """Read a text file with a prompt per line; empty lines do not count.

    Raises:
        DistillError: it cannot be read, or has none.
    """
    try:
        return prompt_lines(path)
    except ValueError as error:
        raise DistillError(f"data.path: {path} {error}") from error


class PromptDataset:
    """Samples whose images the teacher makes, from noise seeded by the sample's number."""

    def __init__(self, data: PromptsData, model: nn.Module, encoder: Encoder, sample: LatentSampler, seed: int) -> None:
        self.data, self.model, self.encoder, self.sample, self.seed = data, model, encoder, sample, seed
        self.prompts = read_prompts(data.path)

    def __len__(self) -> int:
        return len(self.prompts) * self.data.samples_per_prompt

    def caption(self, index: int) -> str:
        return self.prompts[index % len(self.prompts)]

    def name(self, index: int) -> str:
        return f"prompt {self.caption(index)!r}, sample {index // len(self.prompts)}"

    def fingerprint(self) -> str:
        return fingerprint_of(self.prompts)

    def shape(self, index: int, resolution: Shape) -> Shape:
        shapes = bucket_shapes(*resolution, self.encoder.granularity, self.data.buckets)
        return random.Random(f"{self.seed}/shape/{index}").choice(shapes)

    def check(self, index: int) -> None:
        """Raise BadSample for a prompt that cannot be encoded."""
        try:
            self.encoder.check(self.caption(index))
        except ValueError as error:
            raise BadSample(f"it cannot be encoded: {error}") from error

    def get(self, index: int, shape: Shape, resolution: Shape, draw: int | None) -> tuple[int, bool]:
        self.check(index)
        return index, draw is None

    def collate(self, samples: Sequence[tuple[int, bool]], shape: Shape) -> Batch:
        latents = self.latents([index for index, _ in samples], shape)
        captions = ["" if dropped else self.caption(index) for index, dropped in samples]
        conditions = self.encoder.encode_captions(captions) | self.encoder.other_conditions(shape, len(samples))
        return Batch(latents, as_floats(conditions), tuple(captions))

    def decode(self, latents: Tensor) -> Tensor:
        return self.encoder.decode(latents)

    @torch.no_grad()
    def latents(self, indices: Sequence[int], shape: Shape) -> Tensor:
        """Sample with the teacher: latents (B, C, h, w)."""
        captions = [self.caption(index) for index in indices]
        seeds = [seed_of(self.seed, "drawn", index) for index in indices]
        if not converted_sites(self.model):
            return self.sample(captions, shape, seeds)
        with teacher(self.model):
            return self.sample(captions, shape, seeds)


@dataclass
class PromptProducer:
    """Samples of the teacher for a cache, `batch_size` at a time."""

    prompts: PromptDataset
    batch_size: int
    skipped: dict[str, str] = field(default_factory=dict)
    random_access: bool = True

    @property
    def number(self) -> int | None:
        return len(self.prompts)

    def fingerprint(self) -> str:
        return self.prompts.fingerprint()

    def records(self, start: int) -> Iterator[int]:
        return iter(range(start, len(self.prompts)))

    def encode(self, records: Sequence[int], resolutions: Sequence[Shape]) -> tuple[list[Encoded], dict[str, str]]:
        skipped, ready = {}, []
        for index in records:
            try:
                self.prompts.check(index)
                ready.append(index)
            except BadSample as reason:
                skipped[self.prompts.name(index)] = str(reason)
        latents: list[dict[Shape, tuple[Shape, Any]]] = [{} for _ in ready]
        for resolution in resolutions:
            batches = list(by_shape([self.prompts.shape(index, resolution) for index in ready], self.batch_size))
            for shape, numbers in each(batches, "sampling with the teacher: batches", len(batches)):
                sampled = self.prompts.latents([ready[number] for number in numbers], shape)
                for number, own in zip(numbers, sampled, strict=True):
                    latents[number][resolution] = shape, own.clone()
        texts = [self.prompts.caption(index) for index in ready]
        captions = zip(texts, encode_captions(self.prompts.encoder, texts, self.batch_size), strict=True)
        names = [self.prompts.name(index) for index in ready]
        return [Encoded(name, (caption,), own) for name, caption, own in zip(names, captions, latents, strict=True)], skipped

    def empty_caption(self) -> dict[str, Tensor]:
        return self.prompts.encoder.encode_captions([""])
