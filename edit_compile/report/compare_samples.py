"""Images or videos of teacher and student from the same noise, side by side."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from edit_compile.progress import each, working
from edit_compile.report.image_grid import animated_grid, image_format, image_grid, save_image
from edit_compile.student.checkpoint import base_of, load, load_pipeline

# Images (height, width, 3), or videos with frames before, in [0, 1] from prompts, and a seed for each.
SampleMany = Callable[[Sequence[str], Sequence[int]], list[np.ndarray]]


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
        device: of a pipeline that is loaded; default: CUDA, if there is any. The demo models run on the CPU.
    """

    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str | None = None


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

    def _repr_png_(self) -> bytes:
        self.image().save(file := io.BytesIO(), "PNG")
        return file.getvalue()

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
        options: of `SampleOptions`: height, width, steps, guidance, seed, dtype, device.

    Raises:
        CheckpointError: the checkpoint or its base cannot be loaded.
        ConfigError: no prompt, an unknown option, or a size that the model cannot sample.
    """
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not prompts:
        raise ConfigError("no prompt was given")
    chosen = sample_options(**options)
    if str(student) in demo.SOURCES:
        _, sample_many = _demo_sampler(str(student), lambda: load_model(str(student)).model, chosen)
        return Samples(prompts, tuple(sample_many(prompts, range(chosen.seed, chosen.seed + len(prompts)))), ())
    with working("loading teacher and student"):
        model, sample_many = open_sampler(student, base, chosen)
    pairs = []
    for number, prompt in enumerate(each(prompts, "sampling: prompts", len(prompts))):
        (after,) = sample_many([prompt], [chosen.seed + number])
        with teacher(model):
            pairs.append((*sample_many([prompt], [chosen.seed + number]), after))
    return Samples(prompts, *map(tuple, zip(*pairs, strict=True)))


def sample_options(**options: Any) -> SampleOptions:
    """Make options by name.

    Raises:
        ConfigError: there is no such option.
    """
    try:
        return SampleOptions(**options)
    except TypeError:
        unknown = sorted(options.keys() - SampleOptions.__dataclass_fields__.keys())
        raise ConfigError(f"unknown options {unknown}; there are: {', '.join(SampleOptions.__dataclass_fields__)}") from None


def open_sampler(student: Any, base: str | Path | None, options: SampleOptions) -> tuple[Any, SampleMany]:
    """Load what `sample` samples from; returns what `edit_compile.teacher` takes, and the function that samples.

    Raises:
        CheckpointError, ConfigError: as `sample`.
    """
    if isinstance(student, str | Path):
        source = base or base_of(student)
        if source in demo.SOURCES:
            return _demo_sampler(str(source), lambda: load(student), options)
        pipe = load_pipeline(student, base, **dtype_kwarg(getattr(torch, options.dtype)))
        device = options.device or ("cuda" if torch.cuda.is_available() else None)
        return _pipeline_sampler(pipe if device is None else pipe.to(device), options)
    if not isinstance(student, nn.Module):
        return _pipeline_sampler(student, options)
    origins = {str(demo.folder(name)): f"demo/{name}" for name in demo.NAMES}
    source = base if base is not None else origins.get(origin_of(student) or "")
    if source in demo.SOURCES:
        return _demo_sampler(str(source), lambda: student, options)
    raise ConfigError(f"a {type(student).__name__} cannot sample by itself: give a pipeline with it, or the folder it was saved to")


def _demo_sampler(source: str, load_student: Callable[[], nn.Module], options: SampleOptions) -> tuple[nn.Module, SampleMany]:
    side, patch = demo.side_and_patch(source)
    height, width = options.height or side, options.width or side
    if height % patch or width % patch:
        raise ConfigError(f"{height} x {width} px: {source} makes samples whose sides are multiples of {patch}")
    if options.dtype != "float32":
        raise ConfigError(f"the demo models sample in float32, not in {options.dtype}")
    student, chosen = load_student(), _given(steps=options.steps, guidance=options.guidance)

    def sample_many(prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        pairs = zip(prompts, seeds, strict=True)
        try:
            samples = [demo.sample(student, [prompt], seed=seed, height=height, width=width, **chosen) for prompt, seed in pairs]
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return [sample[0].movedim(0, -1).numpy() for sample in samples]

    return student, sample_many


def _pipeline_sampler(pipe: Any, options: SampleOptions) -> tuple[Any, SampleMany]:
    parameters = inspect.signature(pipe.__call__).parameters
    if "prompt" not in parameters:
        raise ConfigError(f"{type(pipe).__name__} takes no prompts; sample from it as usual, and from its teacher inside ec.teacher(pipe)")
    chosen = _given(height=options.height, width=options.width, num_inference_steps=options.steps, guidance_scale=options.guidance)

    def sample_many(prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        several = {"prompt": list(prompts), "generator": generators}
        one = {"prompt": prompts[0], "generator": generators[0]}
        try:
            with _told_of_steps(parameters, options.steps) as told:
                made = pipe(**(one if len(prompts) == 1 else several), output_type="np", **chosen, **told)
        except ValueError as error:
            raise ConfigError(f"{type(pipe).__name__}: {error}") from error
        return list(made.frames if hasattr(made, "frames") else made.images)

    return pipe, sample_many


@contextmanager
def _told_of_steps(parameters: Mapping[str, inspect.Parameter], steps: int | None) -> Iterator[dict[str, Any]]:
    """Yield what a pipeline's call is given, besides its own arguments, so that progress hears of its steps."""
    if "callback_on_step_end" not in parameters:
        yield {}
        return
    usual = parameters["num_inference_steps"].default if "num_inference_steps" in parameters else None
    with working("sampling: steps", steps or (usual if isinstance(usual, int) else None)) as work:

        def step_done(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            work.advance()
            return {}

        yield {"callback_on_step_end": step_done}


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
