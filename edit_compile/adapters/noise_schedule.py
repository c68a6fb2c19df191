"""How noise is added to latents and what a model was trained to predict from them, read from its scheduler's config."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from edit_compile.adapters.hub_access import hub_file
from edit_compile.adapters.sampler_timesteps import timesteps_of_pipeline
from edit_compile.errors import DistillError
from edit_compile.files import read_small

Prediction = Literal["rectified-flow", "epsilon", "v-prediction"]
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v-prediction", "flow_prediction": "rectified-flow"}
_FILE = "scheduler_config.json"
NUM_TRAIN_TIMESTEPS = 1000.0
_LEAST = 1e-4  # of what is divided by


@dataclass(frozen=True)
class DynamicShift:
    """A shift of sigmas that depends on the number of image tokens, computed as diffusers' pipelines do.

    It is exp(mu), with mu on the line through the two points (tokens, mu) `few` and `many`.
    """

    few: tuple[int, float]
    many: tuple[int, float]

    def shift(self, tokens: int) -> float:
        """Return the shift for a number of image tokens."""
        (a, low), (b, high) = self.few, self.many
        return math.exp(low + (high - low) * (tokens - a) / (b - a))


@dataclass(frozen=True)
class NoiseSchedule:
    """How noise is added, x_t = a(t) x_0 + s(t) noise, and what the model was trained to predict from x_t.

    Attributes:
        prediction: "rectified-flow": a = 1 - sigma, s = sigma, predicts noise - x_0; "epsilon": predicts the noise;
            "v-prediction": predicts a noise - s x_0.
        alphas: (T,), the cumulative products of a discrete schedule: a^2 = alphas[t], s^2 = 1 - alphas[t]; None for a flow.
        shift: of a flow's sigmas, sigma' = shift sigma / (1 + (shift - 1) sigma) (Stable Diffusion 3, arXiv 2403.03206).
        dynamic: instead of `shift`, where it depends on the number of image tokens (FLUX): see `at`.
        pipeline: the folder or hub id of the pipeline that it was read from, if it was: see `visited`.
    """

    prediction: Prediction
    alphas: Tensor | None = None
    shift: float = 1.0
    dynamic: DynamicShift | None = None
    pipeline: str | None = field(default=None, compare=False)

    def at(self, tokens: int) -> NoiseSchedule:
        """Return the schedule for images of `tokens` image tokens: a dynamic shift becomes a number."""
        if self.dynamic is None:
            return self
        return replace(self, shift=self.dynamic.shift(tokens), dynamic=None)

    def timesteps(self, u: Tensor, density: str = "uniform") -> Tensor:
        """Map u (B,) in (0, 1) to timesteps (B,), float32 in [0, 1000]; for a discrete schedule, whole numbers below T."""
        if density == "logit-normal":
            u = torch.special.expit(torch.special.ndtri(u))
        if self.alphas is not None:
            return (u * len(self.alphas)).floor().float()
        return (self.shift * u / (1 + (self.shift - 1) * u) * NUM_TRAIN_TIMESTEPS).float()

    def visited(self, steps: int, height: int, width: int, frames: int | None = None) -> Tensor:
        """Return the timesteps (n,), ascending, that the model's sampler visits in a sampling of so many steps.

        They are those of its pipeline. Of a flow without one they are those of Euler's steps between equally spaced sigmas, shifted.

        Args:
            height, width, frames: of the sample, in pixels.

        Raises:
            DistillError: the pipeline of a discrete schedule is not known, or cannot be asked.
        """
        if self.pipeline is not None:
            found = timesteps_of_pipeline(self.pipeline, steps, height, width, frames).float()
        elif self.alphas is None:
            found = self.timesteps(1 - torch.arange(steps, dtype=torch.float64) / steps)
        else:
            raise DistillError(
                "timesteps.sampler_steps: which timesteps a sampler of the model visits is known from its pipeline alone, and that is "
                "not known; leave prediction: auto, or use timesteps: uniform"
            )
        distinct: Tensor = torch.unique(found if self.alphas is None else found.round())
        return distinct

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Add noise to latents (B, ...) at timesteps (B,); returns them and what the model is trained to predict, both (B, ...)."""
        a, s = self._levels(timesteps, latents)
        x = a * latents + s * noise
        if self.prediction == "rectified-flow":
            return x, noise - latents
        return x, noise if self.prediction == "epsilon" else a * noise - s * latents

    def predict_x0_and_noise(self, x: Tensor, prediction: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Solve noisy latents x (B, ...) at timesteps (B,) and a model's prediction for x_0 and the noise, both (B, ...)."""
        a, s = self._levels(timesteps, x)
        if self.prediction == "rectified-flow":
            return x - s * prediction, x + a * prediction
        if self.prediction == "epsilon":
            return (x - s * prediction) / a, prediction
        return a * x - s * prediction, s * x + a * prediction

    def loss_weights(self, kind: str, timesteps: Tensor, gamma: float) -> Tensor:
        """Weigh the squared errors of predictions at timesteps (B,); returns (B,), float32.

        Args:
            kind: "min-snr": min(SNR, gamma) for errors of x_0 (arXiv 2303.09556), SNR = a^2 / s^2; of flows "sigma-sqrt": 1 / s^2, and
                "cosmap": 2 / (pi (1 - 2 s + 2 s^2)) (arXiv 2403.03206), as diffusers' `compute_loss_weighting_for_sd3`.

        Raises:
            DistillError: the kind is of flows only.
        """
        a, s = (level.flatten() for level in self._levels(timesteps, torch.empty(0, device=timesteps.device)))
        if kind == "min-snr":
            snr = (a / s.clamp_min(_LEAST)).square()
            of_x0 = (s / a.clamp_min(_LEAST)).square() if self.prediction == "epsilon" else s.square()  # from an error of the prediction
            return snr.clamp_max(gamma) * of_x0
        if self.alphas is not None:
            raise DistillError(
                f"loss_weighting: {kind} is for models that predict a flow; this one predicts {self.prediction}: use min-snr"
            )
        sigma = s.clamp_min(1 / NUM_TRAIN_TIMESTEPS)
        return sigma**-2 if kind == "sigma-sqrt" else 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and s, (B, 1, ...)."""
        if self.alphas is None:
            s = (timesteps / NUM_TRAIN_TIMESTEPS).to(like)
            a = 1 - s
        else:
            alphas = self.alphas.to(timesteps.device)[timesteps.long()]
            a, s = alphas.sqrt().to(like), (1 - alphas).sqrt().to(like)
        shape = (-1, *[1] * (like.ndim - 1))
        return a.view(shape), s.view(shape)


def schedule_of_pipeline(pipeline: str) -> NoiseSchedule:
    """Read the noise schedule of a pipeline, given its folder or hub id.

    Raises:
        DistillError: its scheduler's config cannot be read, or the scheduler is not known.
    """
    folder = Path(pipeline)
    try:
        path = folder / "scheduler" / _FILE if folder.is_dir() else hub_file(pipeline, f"scheduler/{_FILE}")
        return replace(schedule_of(json.loads(read_small(path))), pipeline=pipeline)
    except DistillError:
        raise
    except Exception as error:  # a scheduler raises whatever its settings run into
        raise DistillError(f"{pipeline}: scheduler/{_FILE} cannot be read: {error}; set prediction: in the recipe") from error


def schedule_of(config: Mapping[str, Any]) -> NoiseSchedule:
    """Read the noise schedule from a diffusers scheduler's config.

    Raises:
        DistillError: the scheduler, or what its model predicts, is not known.
    """
    import diffusers

    name = config.get("_class_name")
    kind: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise DistillError(f"diffusers {diffusers.__version__} has no scheduler {name!r}; set prediction: in the recipe")
    scheduler = cast("Any", kind).from_config(config)
    prediction = scheduler.config.get("prediction_type")
    if prediction is None and not hasattr(scheduler, "alphas_cumprod"):
        prediction = "flow_prediction"  # the flow-matching schedulers have one kind of prediction and do not name it
    if prediction not in _PREDICTIONS:
        raise DistillError(f"{name} says that its model predicts {prediction!r}; known: {', '.join(_PREDICTIONS)}")
    if prediction == "flow_prediction":
        shift = float(scheduler.config.get("shift") or scheduler.config.get("flow_shift") or 1.0)
        return NoiseSchedule("rectified-flow", shift=shift, dynamic=_dynamic(scheduler.config))
    return NoiseSchedule(_PREDICTIONS[prediction], scheduler.alphas_cumprod)


def _dynamic(config: Mapping[str, Any]) -> DynamicShift | None:
    if not config.get("use_dynamic_shifting") or config.get("time_shift_type", "exponential") != "exponential":
        return None
    few = config.get("base_image_seq_len", 256), config.get("base_shift", 0.5)
    many = config.get("max_image_seq_len", 4096), config.get("max_shift", 1.15)
    return DynamicShift(few, many)


def default_schedule(prediction: Prediction) -> NoiseSchedule:
    """Return the schedule for a prediction that the user names: a flow without shift, or the usual 1000 discrete steps.

    Those are of Stable Diffusion, DiT and PixArt: beta rises linearly from 0.0001 to 0.02.
    """
    if prediction == "rectified-flow":
        return NoiseSchedule("rectified-flow")
    from diffusers import DDPMScheduler

    return NoiseSchedule(prediction, DDPMScheduler(num_train_timesteps=1000).alphas_cumprod)
