"""The losses of end-to-end distillation, by name: task, output and feature (EDiT, arXiv 2503.16726), and what others register."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from edit_compile.distillation.registry import Registry
from edit_compile.distillation.train.features import Features, relative_error
from edit_compile.errors import ConfigError, DistillError


@dataclass(frozen=True)
class Comparison:
    """A forward of the student and one of its teacher on the same noisy latents: what losses are computed from.

    Attributes:
        prediction: the student's, (B, C, H, W) float32, with gradient.
        true_target: what the teacher was trained to predict, (B, C, H, W) float32: noise, velocity, ...; None if that is unknown.
        timesteps: (B,), in [0, 1000).
        features: the tensors that each converted site put out, by the site's path.
        teacher, teacher_features: the same of the teacher, without gradient; None and empty unless some loss needs it.
        weights: (B,), of the samples in squared errors, by their timesteps; None: all weigh the same.
    """

    prediction: Tensor
    true_target: Tensor | None
    timesteps: Tensor
    features: Features
    teacher: Tensor | None
    teacher_features: Features
    weights: Tensor | None = None

    def squared_error(self, expected: Tensor) -> Tensor:
        """Compute the mean squared error of the prediction, each sample by its weight."""
        if self.weights is None:
            return F.mse_loss(self.prediction, expected)
        return ((self.prediction - expected).square().flatten(1).mean(1) * self.weights).mean()

    @property
    def target(self) -> Tensor:
        """What the teacher was trained to predict.

        Raises:
            DistillError: that is unknown: the data holds no clean images.
        """
        if self.true_target is None:
            raise DistillError("a loss reads the target, which this data does not tell; register it with needs_target=True, or weight it 0")
        return self.true_target

    @property
    def teacher_prediction(self) -> Tensor:
        """The teacher's prediction.

        Raises:
            DistillError: the teacher did not run.
        """
        if self.teacher is None:
            raise DistillError("a loss reads the teacher's prediction, but is registered with needs_teacher=False")
        return self.teacher

    @cached_property
    def site_errors(self) -> dict[str, Tensor]:
        """Compare every converted site's output with its teacher's, relative to the energy of the teacher's; a mean over the batch."""
        return {path: relative_error(self.features[path], expected).mean() for path, expected in self.teacher_features.items()}


Compute = Callable[[Comparison], Tensor]


@dataclass(frozen=True)
class Loss:
    """A registered loss.

    Attributes:
        compute: from a comparison to a scalar.
        needs_teacher: whether the teacher must run for it.
        needs_target: whether it reads what the teacher was trained to predict, which calls of a pipeline do not tell.
        default_weight: its weight in recipes that do not mention it; losses from outside are not measured there.
    """

    compute: Compute
    needs_teacher: bool
    needs_target: bool
    default_weight: float


Registered = TypeVar("Registered", bound=Callable[..., Any])


def register_loss(
    name: str, *, needs_teacher: bool = True, needs_target: bool = False, default_weight: float = 0.0
) -> Callable[[Registered], Registered]:
    """Make a decorator that registers a loss for recipes with `losses: {name: weight}`.

    It decorates a function from a `Comparison` to a scalar tensor, or a class whose instances have it as `compute`. Packages
    may instead name either in an entry point of the group `edit_compile.losses`.

    Raises:
        ConfigError: the name is taken.
    """

    def register(loss: Registered) -> Registered:
        compute: Any = loss().compute if isinstance(loss, type) else loss
        if not callable(compute):
            raise ConfigError(f"loss {name!r} must be a function of a Comparison, or a class with `compute`, not {loss!r}")
        LOSSES.add(name, Loss(compute, needs_teacher, needs_target, default_weight), f"{loss.__module__}.{loss.__qualname__}")
        return loss

    return register


LOSSES: Registry[Loss] = Registry("a loss", "edit_compile.losses", lambda name, loss: register_loss(name)(loss))


def loss_names() -> tuple[str, ...]:
    """List the names of all losses."""
    return LOSSES.names()


@register_loss("task", needs_teacher=False, needs_target=True)
def task(comparison: Comparison) -> Tensor:
    """Compute the mean squared error of the prediction against what the teacher was trained to predict."""
    return comparison.squared_error(comparison.target)


@register_loss("output", default_weight=1.0)
def output(comparison: Comparison) -> Tensor:
    """Compute the mean squared error of the prediction against the teacher's."""
    return comparison.squared_error(comparison.teacher_prediction)


@register_loss("feature", default_weight=0.5)
def feature(comparison: Comparison) -> Tensor:
    """Average the errors of all converted sites relative to their teachers' outputs."""
    return torch.stack(list(comparison.site_errors.values())).mean()


DEFAULT_WEIGHTS = {name: LOSSES.get(name).default_weight for name in ("task", "output", "feature")}
"""The losses that every run measures, and their weights unless the recipe gives others."""
