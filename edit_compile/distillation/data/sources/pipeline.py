"""Data of kind `pipeline`: the calls of the model that its own pipeline makes while it samples. No adapter needed.

What the student learns is to predict what its teacher predicts at the inputs that sampling meets; there are no clean images,
and so no task loss.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from edit_compile.adapters.pipeline_calls import FRAMES, Call, CallRecorder, merged
from edit_compile.api import teacher
from edit_compile.demo import models as demo
from edit_compile.distillation.data.records import fingerprint_of
from edit_compile.distillation.data.registry import DataConfig, register_data
from edit_compile.distillation.data.seeding import seed_of
from edit_compile.distillation.data.source import Batch, BatchRequest, DataSource, RecordedCalls, SourceContext
from edit_compile.distillation.data.sources.prompts import read_prompts
from edit_compile.errors import DistillError
from edit_compile.student.site import converted_sites

Sampled = tuple[str, int, int, int, int | None]  # split, number of the prompt's sample, height, width and frames


@register_data("pipeline")
class PipelineData(DataConfig):
    """Prompts with which the model's pipeline samples while training; the teacher's predictions are the targets."""

    kind: Literal["pipeline"]
    path: Path
    """A text file with a prompt per line; empty lines do not count."""
    call: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the pipeline's call, for example {num_inference_steps: 20, guidance_scale: 5}."""
    together: PositiveInt = 8
    """Samples that are kept in memory and shuffled; each gives as many calls as the pipeline takes steps."""
    held_out: PositiveInt | None = None
    """Prompts that are never trained on. Default: a fiftieth of them, at least one."""

    sampled_by_teacher: ClassVar[bool] = True
    recorded_calls: ClassVar[bool] = True

    @property
    def video_frames(self) -> int | None:
        frames = self.call.get(FRAMES)
        return frames if isinstance(frames, int) else None

    @property
    def pipeline_options(self) -> Mapping[str, Any]:
        return self.call

    def check_model(self, model: nn.Module, base: str | None) -> None:
        """Accept a model whose place is known, unless it is a demo's."""
        _pipeline_at(base)

    def check_files(self, model: nn.Module) -> None:
        """Read the prompts."""
        read_prompts(self.path)

    def open(self, context: SourceContext) -> DataSource:
        """Open a source that samples while the model trains, in the same thread."""
        base = _pipeline_at(context.base)
        recorder = CallRecorder(base, context.model, context.device, context.dtype, self.call)
        return PipelineSource(self, recorder, read_prompts(self.path), context.seed)


def _pipeline_at(base: str | None) -> str:
    if base is None or base in demo.SOURCES:
        raise DistillError(f"data.kind: pipeline needs the model's pipeline, and {base or 'its place'} is not known to be one")
    return base


class PipelineSource:
    """Draws the calls of the training set from `together` samples at a time, until each was drawn as often as it has calls."""

    concurrent = False  # it calls the model

    def __init__(self, data: PipelineData, recorder: CallRecorder, prompts: list[str], seed: int) -> None:
        held_out = data.held_out or max(1, len(prompts) // 50)
        if held_out >= len(prompts):
            raise DistillError(f"data.path: {data.path} has {len(prompts)} prompts, and all of them are held out: none is left to train on")
        self.prompts = {"train": prompts[held_out:], "validation": prompts[:held_out]}
        self.recorder, self.seed, self.together = recorder, seed, data.together
        self.skipped: dict[str, str] = {}
        self.kept: dict[str, OrderedDict[Sampled, list[Call]]] = {"train": OrderedDict(), "validation": OrderedDict()}
        self.steps: int | None = None

    def check(self, height: int, width: int, frames: int | None = None) -> None:
        self.steps = self.steps or len(self._calls(("validation", 0, height, width, frames)))

    def batch(self, request: BatchRequest) -> Batch:
        raise DistillError("data.kind: pipeline has calls of the model, not images")

    def recorded(self, request: BatchRequest, timesteps: Tensor) -> RecordedCalls:
        calls = [self._call(request, position, float(t)) for position, t in zip(request.positions, timesteps, strict=True)]
        return RecordedCalls(merged(calls), timesteps)

    def decode(self, latents: Tensor) -> None:
        return None

    def fingerprint(self) -> str:
        return fingerprint_of(self.prompts["validation"] + self.prompts["train"])

    def _call(self, request: BatchRequest, position: int, timestep: float) -> Call:
        calls = self._calls((request.split, self._number(request, position), request.height, request.width, request.frames))
        return calls[min(int((1 - timestep / 1000) * len(calls)), len(calls) - 1)]

    def _number(self, request: BatchRequest, position: int) -> int:
        """Choose the sample whose call stands at a position of the stream: a function of the position alone."""
        if request.split == "validation":
            return position % len(self.prompts["validation"])
        if self.steps is None:
            self.check(request.height, request.width, request.frames)
        assert self.steps is not None
        return position // (self.together * self.steps) * self.together + seed_of(self.seed, "call", position) % self.together

    def _calls(self, sampled: Sampled) -> list[Call]:
        split, number, height, width, frames = sampled
        kept = self.kept[split]
        if sampled not in kept:
            prompt = self.prompts[split][number % len(self.prompts[split])]
            kept[sampled] = self._sample(prompt, seed_of(self.seed, split, number), height, width, frames)
            while split == "train" and len(kept) > self.together:
                kept.popitem(last=False)
        return kept[sampled]

    @torch.no_grad()
    def _sample(self, prompt: str, seed: int, height: int, width: int, frames: int | None) -> list[Call]:
        if not converted_sites(self.recorder.model):
            return self.recorder.calls(prompt, height, width, seed, frames)
        with teacher(self.recorder.model):
            return self.recorder.calls(prompt, height, width, seed, frames)
