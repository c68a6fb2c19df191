"""Pictures of teacher and student from the same noise, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edit_compile.adapters.pipelines import weights_in
from edit_compile.api import teacher
from edit_compile.demo import models as demo
from edit_compile.demo import shapes
from edit_compile.errors import ConfigError
from edit_compile.student.checkpoint import base_of, load, load_pipeline

MULTIPLE = 2  # the demo models' patch


@dataclass(frozen=True)
class SampleOptions:
    """How pictures are drawn. None: the pipeline's own default (for the demo models 32 x 32 px, 25 steps, guidance 2).

    Attributes:
        height, width: of the picture, in pixels.
        seed: of the first picture; the n-th has `seed + n`, the same for teacher and student.
        dtype: of the pipeline's weights: float32, bfloat16 or float16. The demo models draw in float32.
    """

    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    dtype: str = "float32"


Draw = Callable[[str, int], np.ndarray]  # of a prompt and a seed


def side_by_side(
    folder: str | Path, prompts: Sequence[str], options: SampleOptions, base: str | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(teacher's picture, student's picture) for every prompt, each (height, width, 3) in [0, 1].

    Args:
        folder: a checkpoint made by `save`.
        base: the pipeline's folder or hub id; default: as the checkpoint says.

    Raises:
        CheckpointError: the checkpoint or its base cannot be loaded.
        ConfigError: no prompt, or a size that the model cannot draw.
    """
    if not prompts:
        raise ConfigError("no prompt was given")
    source = base or base_of(folder)
    student, draw = _demo_sampler(folder, options) if source in demo.SOURCES else _pipeline_sampler(folder, source, options)
    pairs = []
    for number, prompt in enumerate(prompts):
        after = draw(prompt, options.seed + number)
        with teacher(student):
            pairs.append((draw(prompt, options.seed + number), after))
    return pairs


def _demo_sampler(folder: str | Path, options: SampleOptions) -> tuple[nn.Module, Draw]:
    height, width = options.height or shapes.IMAGE_SIZE, options.width or shapes.IMAGE_SIZE
    if height % MULTIPLE or width % MULTIPLE:
        raise ConfigError(f"{height} x {width} px: the demo models draw pictures whose sides are multiples of {MULTIPLE}")
    if options.dtype != "float32":
        raise ConfigError(f"the demo models draw in float32, not in {options.dtype}")
    student = load(folder)
    chosen: dict[str, Any] = {"steps": options.steps, "guidance": options.guidance}
    chosen = {name: value for name, value in chosen.items() if value is not None}

    def draw(prompt: str, seed: int) -> np.ndarray:
        try:
            pictures = demo.sample(student, [prompt], seed=seed, height=height, width=width, **chosen)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return pictures[0].permute(1, 2, 0).numpy()

    return student, draw


def _pipeline_sampler(folder: str | Path, base: str | None, options: SampleOptions) -> tuple[nn.Module, Draw]:
    pipe = load_pipeline(folder, base, **weights_in(getattr(torch, options.dtype)))
    if torch.cuda.is_available():
        pipe.to("cuda")
    chosen = {
        "height": options.height,
        "width": options.width,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}

    def draw(prompt: str, seed: int) -> np.ndarray:
        try:
            return pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), output_type="np", **chosen).images[0]
        except ValueError as error:
            raise ConfigError(f"{type(pipe).__name__}: {error}") from error

    return pipe.transformer, draw
