"""Images of teacher and student from the same noise, side by side."""

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

from edit_compile.adapters.pipelines import dtype_kwarg, origin_of
from edit_compile.api import teacher
from edit_compile.demo import models as demo
from edit_compile.demo import shapes
from edit_compile.errors import ConfigError
from edit_compile.report.image_grid import image_grid, save_image
from edit_compile.student.checkpoint import base_of, load, load_pipeline

MULTIPLE = 2  # the demo models' patch

SampleOne = Callable[[str, int], np.ndarray]  # an image (height, width, 3) in [0, 1] from a prompt and a seed


@dataclass(frozen=True)
class SampleOptions:
    """How images are sampled. None: the pipeline's own default (for the demo models 32 x 32 px, 25 steps, guidance 2).

    Attributes:
        height, width: in pixels.
        steps: of the sampler.
        guidance: the scale of classifier-free guidance.
        seed: of the first image; the n-th has `seed + n`, the same for teacher and student.
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
    """Images (height, width, 3) in [0, 1] by teacher and student, one each for every prompt."""

    prompts: tuple[str, ...]
    teacher: tuple[np.ndarray, ...]
    student: tuple[np.ndarray, ...]

    def image(self) -> Image.Image:
        """Lay them out: a row for each prompt, teacher on the left and student on the right."""
        return image_grid(self.prompts, [("teacher", self.teacher), ("student", self.student)])

    def save(self, path: str | Path) -> None:
        """Write that image as PNG, JPEG or WebP.

        Raises:
            ConfigError: the path ends otherwise.
        """
        save_image(self.image(), Path(path))


def sample(student: Any, prompts: str | Sequence[str], *, base: str | Path | None = None, **options: Any) -> Samples:
    """Sample from teacher and student with the same noise.

    Args:
        student: a checkpoint's folder, a pipeline with a converted transformer, or a converted demo model.
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
            return _demo_sampler(lambda: load(student), options)
        pipe = load_pipeline(student, source, **dtype_kwarg(getattr(torch, options.dtype)))
        return _pipeline_sampler(pipe.to("cuda") if torch.cuda.is_available() else pipe, options)
    if not isinstance(student, nn.Module):
        return _pipeline_sampler(student, options)
    folders = [str(demo.folder(name)) for name in demo.NAMES]
    if base in demo.SOURCES or (base is None and origin_of(student) in folders):
        return _demo_sampler(lambda: student, options)
    raise ConfigError(f"a {type(student).__name__} cannot sample by itself: give a pipeline with it, or the folder it was saved to")


def _demo_sampler(load_student: Callable[[], nn.Module], options: SampleOptions) -> tuple[nn.Module, SampleOne]:
    height, width = options.height or shapes.IMAGE_SIZE, options.width or shapes.IMAGE_SIZE
    if height % MULTIPLE or width % MULTIPLE:
        raise ConfigError(f"{height} x {width} px: the demo models sample images whose sides are multiples of {MULTIPLE}")
    if options.dtype != "float32":
        raise ConfigError(f"the demo models sample in float32, not in {options.dtype}")
    student, chosen = load_student(), _given(steps=options.steps, guidance=options.guidance)

    def sample_one(prompt: str, seed: int) -> np.ndarray:
        try:
            images = demo.sample(student, [prompt], seed=seed, height=height, width=width, **chosen)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        pixels: np.ndarray = images[0].permute(1, 2, 0).numpy()
        return pixels

    return student, sample_one


def _pipeline_sampler(pipe: Any, options: SampleOptions) -> tuple[Any, SampleOne]:
    if "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise ConfigError(f"{type(pipe).__name__} takes no prompts; sample from it as usual, and from its teacher inside ec.teacher(pipe)")
    chosen = _given(height=options.height, width=options.width, num_inference_steps=options.steps, guidance_scale=options.guidance)

    def sample_one(prompt: str, seed: int) -> np.ndarray:
        try:
            images = pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), output_type="np", **chosen).images
        except ValueError as error:
            raise ConfigError(f"{type(pipe).__name__}: {error}") from error
        pixels: np.ndarray = images[0]
        return pixels

    return pipe, sample_one


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
