"""What a model was trained to predict, read from its scheduler's config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edit_compile.distill.noise import DynamicShift, Process
from edit_compile.errors import DistillError

_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v-prediction", "flow_prediction": "rectified-flow"}
_FILE = "scheduler_config.json"


def process_of_pipeline(pipeline: str) -> Process:
    """The noise process of a pipeline, given its folder or hub id.

    Raises:
        DistillError: its scheduler's config cannot be read, or is of an unknown kind.
    """
    folder = Path(pipeline)
    try:
        path = folder / "scheduler" / _FILE if folder.is_dir() else _downloaded(pipeline)
        return process_of(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise DistillError(f"{pipeline}: scheduler/{_FILE} cannot be read: {error}; set prediction: in the recipe") from error


def _downloaded(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, f"scheduler/{_FILE}"))


def process_of(config: Mapping[str, Any]) -> Process:
    """The noise process that a diffusers scheduler's config describes.

    Raises:
        DistillError: the scheduler, or what its model predicts, is not known.
    """
    import diffusers

    name = config.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if kind is None:
        raise DistillError(f"diffusers {diffusers.__version__} has no scheduler {name!r}; set prediction: in the recipe")
    scheduler = kind.from_config(config)
    prediction = scheduler.config.get("prediction_type")
    if prediction is None and not hasattr(scheduler, "alphas_cumprod"):
        prediction = "flow_prediction"  # the flow-matching schedulers have one kind of prediction and do not name it
    if prediction not in _PREDICTIONS:
        raise DistillError(f"{name} says that its model predicts {prediction!r}; known are: {', '.join(_PREDICTIONS)}")
    if prediction == "flow_prediction":
        shift = float(scheduler.config.get("shift") or scheduler.config.get("flow_shift") or 1.0)
        return Process("rectified-flow", shift=shift, dynamic=_dynamic(scheduler.config))
    return Process(_PREDICTIONS[prediction], scheduler.alphas_cumprod)  # type: ignore[arg-type]


def _dynamic(config: Mapping[str, Any]) -> DynamicShift | None:
    if not config.get("use_dynamic_shifting") or config.get("time_shift_type", "exponential") != "exponential":
        return None
    few = config.get("base_image_seq_len", 256), config.get("base_shift", 0.5)
    many = config.get("max_image_seq_len", 4096), config.get("max_shift", 1.15)
    return DynamicShift(few, many)


def default_process(prediction: str) -> Process:
    """The process of a prediction named by the user: a flow without shift, or the usual schedule of 1000 steps.

    The schedule is that of Stable Diffusion, DiT and PixArt: beta linear from 0.0001 to 0.02.
    """
    if prediction == "rectified-flow":
        return Process("rectified-flow")
    from diffusers import DDPMScheduler

    return Process(prediction, DDPMScheduler(num_train_timesteps=1000).alphas_cumprod)  # type: ignore[arg-type]
