"""The timesteps that a pipeline's sampler visits: asked of the pipeline itself, which runs without weights up to its first step."""

from __future__ import annotations

import inspect
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edit_compile.adapters.pipeline_structure import pipeline_structure
from edit_compile.adapters.record_inputs import record
from edit_compile.errors import DistillError, EditCompileError, first_line


def timesteps_of_pipeline(pipeline: str, steps: int, height: int, width: int, frames: int | None = None) -> Tensor:
    """Return the timesteps (n,) that a pipeline's scheduler visits in a sampling, in order.

    Pipelines give their schedulers more than a number of steps: FLUX's its sigmas, and a shift that depends on the size.

    Args:
        pipeline: its folder or hub id.
        height, width, frames: of the sample, in pixels.

    Raises:
        DistillError: the pipeline cannot be asked; says why.
    """
    return _timesteps(pipeline, _changed(pipeline), steps, height, width, frames)


def _changed(pipeline: str) -> int | None:
    """Return when a pipeline's scheduler was changed; None if it is no folder."""
    config = Path(pipeline) / "scheduler" / "scheduler_config.json"
    return config.stat().st_mtime_ns if config.is_file() else None


@lru_cache(maxsize=64)
def _timesteps(pipeline: str, changed: int | None, steps: int, height: int, width: int, frames: int | None) -> Tensor:
    try:
        pipe = _structure(pipeline, changed)
        accepted = inspect.signature(type(pipe).__call__).parameters
        options: dict[str, Any] = {"num_inference_steps": steps, "height": height, "width": width, "num_frames": frames}
        record(pipe, **{name: value for name, value in options.items() if name in accepted and value is not None})
        return torch.as_tensor(pipe.scheduler.timesteps).detach().cpu()
    except (EditCompileError, ImportError, OSError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DistillError(
            f"timesteps.sampler_steps: the timesteps of {steps} steps at {height} x {width} px cannot be asked of {pipeline}: "
            f"{first_line(error)}; use timesteps: uniform"
        ) from error


@lru_cache(maxsize=1)
def _structure(pipeline: str, changed: int | None) -> Any:
    return pipeline_structure(pipeline)
