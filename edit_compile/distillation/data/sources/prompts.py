"""Data of kind `prompts`: no pictures at all. The teacher draws them itself, from captions in a text file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import nn

from edit_compile.adapters.sampling import LatentSampler
from edit_compile.api import teacher
from edit_compile.distillation.data.buckets import Buckets, Shape, bucket_shapes
from edit_compile.distillation.data.captioned import Encoder, as_floats
from edit_compile.distillation.data.records import Unreadable
from edit_compile.distillation.data.seeding import seed_of
from edit_compile.distillation.data.source import Batch
from edit_compile.errors import DistillError
from edit_compile.frozen import Frozen
from edit_compile.student.site import converted_sites


class PromptsData(Frozen):
    """Captions whose pictures the teacher draws. Drawing costs many forwards a sample: `edit-compile cache` does it once.

    Attributes:
        path: a text file, a caption in each line; empty lines do not count.
        samples_per_prompt: pictures of one caption, each from noise of its own.
        steps: of the pipeline's sampler. Default: as many as it takes itself.
        guidance: the scale of guidance. Default: the pipeline's own.
        buckets: aspect ratios, drawn evenly for the samples; null for the stage's resolution alone.
        text_tokens: the longest caption in tokens of the pipeline's longest encoder. Default: the pipeline's own.
        caption_dropout: the share of samples whose caption is empty, which guidance needs.
        held_out: the number of samples that are never trained on. Default: a fiftieth of them, 8 to 256.
    """

    kind: Literal["prompts"]
    path: Path
    samples_per_prompt: PositiveInt = 1
    steps: PositiveInt | None = None
    guidance: Annotated[float, Field(ge=0)] | None = None
    buckets: Buckets | None = None
    text_tokens: PositiveInt | None = None
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    held_out: PositiveInt | None = None

    def options(self) -> dict[str, Any]:
        """As the pipeline's call names them."""
        named = {"num_inference_steps": self.steps, "guidance_scale": self.guidance, "max_sequence_length": self.text_tokens}
        return {name: value for name, value in named.items() if value is not None}

    def prompts(self) -> list[str]:
        """The captions.

        Raises:
            DistillError: the file cannot be read, or has none.
        """
        try:
            found = [line.strip() for line in self.path.read_text("utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DistillError(f"data.path: {self.path} cannot be read: {error}") from error
        if not found:
            raise DistillError(f"data.path: {self.path} has no prompts")
        return found


class Prompts:
    """The items: a sample's picture is drawn by the teacher from noise seeded by the sample's number."""

    def __init__(self, data: PromptsData, model: nn.Module, encoder: Encoder, draw: LatentSampler, seed: int) -> None:
        self.data, self.model, self.encoder, self.draw, self.seed = data, model, encoder, draw, seed
        self.prompts = data.prompts()

    def __len__(self) -> int:
        return len(self.prompts) * self.data.samples_per_prompt

    def caption(self, index: int) -> str:
        return self.prompts[index % len(self.prompts)]

    def name(self, index: int) -> str:
        return f"prompt {self.caption(index)!r}, sample {index // len(self.prompts)}"

    def shape(self, index: int, resolution: Shape) -> Shape:
        shapes = bucket_shapes(*resolution, self.encoder.granularity, self.data.buckets)
        return random.Random(f"{self.seed}/shape/{index}").choice(shapes)

    def get(self, index: int, shape: Shape, resolution: Shape, empty: bool) -> tuple[int, bool]:
        try:
            self.encoder.check(self.caption(index))
        except ValueError as error:
            raise Unreadable(f"it cannot be encoded: {error}") from error
        return index, empty

    def collate(self, samples: Sequence[tuple[int, bool]], shape: Shape) -> Batch:
        latents = self.drawn([index for index, _ in samples], shape)
        captions = ["" if empty else self.caption(index) for index, empty in samples]
        conditions = self.encoder.encode_captions(captions) | self.encoder.other_conditions(shape, len(samples))
        return Batch(latents, as_floats(conditions), tuple(captions))

    def pixels(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.encoder.decode(pictures)

    @torch.no_grad()
    def drawn(self, indices: Sequence[int], shape: Shape) -> torch.Tensor:
        """The teacher's samples, latents (B, C, h, w)."""
        captions = [self.caption(index) for index in indices]
        seeds = [seed_of(self.seed, "drawn", index) for index in indices]
        if not converted_sites(self.model):
            return self.draw(captions, shape, seeds)
        with teacher(self.model):
            return self.draw(captions, shape, seeds)
