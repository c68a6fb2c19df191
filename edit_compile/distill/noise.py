"""Noise and timesteps: functions of a sample's position, so that nothing about them has to be saved or shared."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["rectified-flow", "epsilon", "v-prediction"]
_GOLDEN = 0.6180339887498949
MOST_TIME = 1000.0


def seed_of(*parts: object) -> int:
    """A seed that differs wherever the parts differ."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest(), "big")


def noise_for(positions: Sequence[int], shape: Sequence[int], seed: int, split: str) -> Tensor:
    """Standard normal noise, (len(positions), *shape), each row seeded by its position."""
    rows = [torch.randn(*shape, generator=torch.Generator().manual_seed(seed_of(seed, split, p))) for p in positions]
    return torch.stack(rows)


def spread(positions: Sequence[int], seed: int) -> Tensor:
    """A number in (0, 1) for each position, (B,) float64: neighbours are spread evenly (additive recurrence by the golden ratio)."""
    start = seed_of(seed, "spread") / 2**56
    return torch.tensor([(start + p * _GOLDEN) % 1 for p in positions], dtype=torch.float64).clamp(1e-6, 1 - 1e-6)


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
