"""Images or videos of teacher and student from the same noise, side by side."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from edit_compile.adapters.load_model import load_model
from edit_compile.adapters.pipelines import dtype_kwarg, origin_of
from edit_compile.api import teacher
from edit_compile.demo import models as demo
from edit_compile.errors import ConfigError
from edit_compile.report.image_grid import animated_grid, image_format, image_grid, save_image
from edit_compile.student.checkpoint import base_of, load, load_pipeline

SampleOne = Callable[
    [str, int], np.ndarray
]  # an image (height, width, 3), or a video with frames before, in [0, 1] from a prompt and a seed


@dataclass(frozen=True)
class SampleOptions:
    """How images or videos are sampled. None: the pipeline's own default (for the demo models the size of their training data,
    25 steps, guidance 2).

    Attributes:
        height, width: in pixels.
        steps: of the sampler.
        guidance: the scale of classifier-free guidance.
        seed: of the first sample; the n-th has `seed + n`, the same for teacher and student.
        dtype: of weights that are loaded: float32, bfloat16 or float16. The demo models run in float32.
    """

    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    dtype: str = "float32"


@dataclass(frozen=True)
class Samples:
    """Images (height, width, 3), or videos (frames, height, width, 3), in [0, 1] by teacher and student, one each for every prompt.

    A model that is not converted is a teacher without a student.
    """

    prompts: tuple[str, ...]
    teacher: tuple[np.ndarray, ...]
    student: tuple[np.ndarray, ...]

    def image(self) -> Image.Image:
        """Lay them out: a row for each prompt, teacher on the left and student on the right; frames of videos side by side."""
        return image_grid(self.prompts, self._columns)

    def save(self, path: str | Path) -> None:
        """Write that image as PNG, JPEG, WebP or GIF; in a GIF, videos move.

        Raises:
            ConfigError: the path ends otherwise.
        """
        moves = image_format(Path(path)) == "GIF" and self.teacher[0].ndim == 4
        frames = animated_grid(self.prompts, self._columns) if moves else [self.image()]
        save_image(frames[0], Path(path), *frames[1:])

    @property
    def _columns(self) -> list[tuple[str, tuple[np.ndarray, ...]]]:
        return [("teacher", self.teacher), *([("student", self.student)] if self.student else [])]


def sample(student: Any, prompts: str | Sequence[str], *, base: str | Path | None = None, **options: Any) -> Samples:
    """Sample from teacher and student with the same noise.

    Args:
        student: a checkpoint's folder, a pipeline with a converted transformer, or a converted demo model. The name of a
            demo model, demo/NAME, samples from that alone.
        prompts: what the images show, one prompt for each row.
        base: the folder or hub id of the base pipeline; default: as the checkpoint says.
        options: of `SampleOptions`: height, width, steps, guidance, seed, dtype.

    Raises:
        CheckpointError: the checkpoint or its base cannot be loaded.
        ConfigError: no prompt, an unknown option, or a size that the model cannot sample.
    """
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not prompts:
        raise ConfigError("no prompt was given")
    try:
        chosen = SampleOptions(**options)
    except TypeError:
        unknown = sorted(options.keys() - SampleOptions.__dataclass_fields__.keys())
        raise ConfigError(f"unknown options {unknown}; there are: {', '.join(SampleOptions.__dataclass_fields__)}") from None
    if str(student) in demo.SOURCES:
        _, sample_one = _demo_sampler(str(student), lambda: load_model(str(student)).model, chosen)
        return Samples(prompts, tuple(sample_one(prompt, chosen.seed + number) for number, prompt in enumerate(prompts)), ())
    model, sample_one = _sampler(student, base, chosen)
    pairs = []
    for number, prompt in enumerate(prompts):
        after = sample_one(prompt, chosen.seed + number)
        with teacher(model):
            pairs.append((sample_one(prompt, chosen.seed + number), after))
    return Samples(prompts, *map(tuple, zip(*pairs, strict=True)))


def _sampler(student: Any, base: str | Path | None, options: SampleOptions) -> tuple[Any, SampleOne]:
    if isinstance(student, str | Path):
        source = base or base_of(student)
        if source in demo.SOURCES:
            return _demo_sampler(str(source), lambda: load(student), options)
        pipe = load_pipeline(student, source, **dtype_kwarg(getattr(torch, options.dtype)))
        return _pipeline_sampler(pipe.to("cuda") if torch.cuda.is_available() else pipe, options)
    if not isinstance(student, nn.Module):
        return _pipeline_sampler(student, options)
    origins = {str(demo.folder(name)): f"demo/{name}" for name in demo.NAMES}
    source = base if base is not None else origins.get(origin_of(student) or "")
    if source in demo.SOURCES:
        return _demo_sampler(str(source), lambda: student, options)
    raise ConfigError(f"a {type(student).__name__} cannot sample by itself: give a pipeline with it, or the folder it was saved to")


def _demo_sampler(source: str, load_student: Callable[[], nn.Module], options: SampleOptions) -> tuple[nn.Module, SampleOne]:
    side, patch = demo.side_and_patch(source)
    height, width = options.height or side, options.width or side
    if height % patch or width % patch:
        raise ConfigError(f"{height} x {width} px: {source} makes samples whose sides are multiples of {patch}")
    if options.dtype != "float32":
        raise ConfigError(f"the demo models sample in float32, not in {options.dtype}")
    student, chosen = load_student(), _given(steps=options.steps, guidance=options.guidance)

    def sample_one(prompt: str, seed: int) -> np.ndarray:
        try:
            samples = demo.sample(student, [prompt], seed=seed, height=height, width=width, **chosen)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        pixels: np.ndarray = samples[0].movedim(0, -1).numpy()
        return pixels

    return student, sample_one


def _pipeline_sampler(pipe: Any, options: SampleOptions) -> tuple[Any, SampleOne]:
    if "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise ConfigError(f"{type(pipe).__name__} takes no prompts; sample from it as usual, and from its teacher inside ec.teacher(pipe)")
    chosen = _given(height=options.height, width=options.width, num_inference_steps=options.steps, guidance_scale=options.guidance)

    def sample_one(prompt: str, seed: int) -> np.ndarray:
        try:
            made = pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), output_type="np", **chosen)
        except ValueError as error:
            raise ConfigError(f"{type(pipe).__name__}: {error}") from error
        pixels: np.ndarray = (made.frames if hasattr(made, "frames") else made.images)[0]
        return pixels

    return pipe, sample_one


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
