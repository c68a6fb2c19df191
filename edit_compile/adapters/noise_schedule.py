"""What a model was trained to predict of noisy latents, read from its scheduler's config."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from edit_compile.errors import DistillError

_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v-prediction", "flow_prediction": "rectified-flow"}
_FILE = "scheduler_config.json"
Prediction = Literal["rectified-flow", "epsilon", "v-prediction"]
MOST_TIME = 1000.0


@dataclass(frozen=True)
class DynamicShift:
    """A shift exp(mu), mu a line through (tokens, mu) of `few` and `many`, as diffusers' pipelines work it out."""

    few: tuple[int, float]
    many: tuple[int, float]

    def shift(self, tokens: int) -> float:
        (a, low), (b, high) = self.few, self.many
        return math.exp(low + (high - low) * (tokens - a) / (b - a))


@dataclass(frozen=True)
class Process:
    """How the teacher was trained to see noise: x_t = a(t) picture + s(t) noise, and what it predicts of it.

    Attributes:
        prediction: "rectified-flow": a = 1 - sigma, s = sigma, predicts noise - picture; "epsilon": predicts the noise;
            "v-prediction": predicts a noise - s picture.
        alphas: (T,), the cumulative products of a discrete schedule: a^2 = alphas[t], s^2 = 1 - alphas[t]; None for a flow.
        shift: of a flow's sigmas, sigma' = shift sigma / (1 + (shift - 1) sigma) (Stable Diffusion 3, arXiv 2403.03206).
        dynamic: instead of `shift`, where it depends on the number of image tokens (FLUX): see `at`.
    """

    prediction: Prediction
    alphas: Tensor | None = None
    shift: float = 1.0
    dynamic: DynamicShift | None = None

    def at(self, tokens: int) -> Process:
        """The process for pictures of so many image tokens."""
        if self.dynamic is None:
            return self
        return replace(self, shift=self.dynamic.shift(tokens), dynamic=None)

    def times(self, u: Tensor, density: str = "uniform") -> Tensor:
        """Numbers in (0, 1) to timesteps, (B,) float32 in [0, 1000); of a discrete schedule, whole numbers below T."""
        if density == "logit-normal":
            u = torch.special.expit(torch.special.ndtri(u))
        if self.alphas is not None:
            return (u * len(self.alphas)).floor().float()
        return (self.shift * u / (1 + (self.shift - 1) * u) * MOST_TIME).float()

    def mixed(self, pictures: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy pictures, and what the model is trained to predict of them; both shaped as the pictures."""
        a, s = self._levels(times, pictures)
        x = a * pictures + s * noise
        if self.prediction == "rectified-flow":
            return x, noise - pictures
        return x, noise if self.prediction == "epsilon" else a * noise - s * pictures

    def split(self, x: Tensor, prediction: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy pictures and what a model predicts of them to the picture and the noise that it sees in them."""
        a, s = self._levels(times, x)
        if self.prediction == "rectified-flow":
            return x - s * prediction, x + a * prediction
        if self.prediction == "epsilon":
            return (x - s * prediction) / a, prediction
        return a * x - s * prediction, s * x + a * prediction

    def _levels(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.alphas is None:
            s = (times / MOST_TIME).to(like)
            a = 1 - s
        else:
            alphas = self.alphas.to(times.device)[times.long()]
            a, s = alphas.sqrt().to(like), (1 - alphas).sqrt().to(like)
        shape = (-1, *[1] * (like.ndim - 1))
        return a.view(shape), s.view(shape)


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
