"""The three losses of end-to-end distillation (EDiT, arXiv 2503.16726): task, output and feature, in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit_compile.distillation.context import Context, Sample
from edit_compile.distillation.recipe.schema import Losses
from edit_compile.distillation.train.features import Features, recorded, relative_error


@dataclass(frozen=True)
class Measured:
    """The losses of one forward.

    Attributes:
        total: their weighted sum, to go backward from.
        parts: each on its own, without its weight and without gradient.
        sites: the feature loss of every site by path, likewise.
    """

    total: Tensor
    parts: dict[str, Tensor]
    sites: dict[str, Tensor]


def distillation_losses(context: Context, model: nn.Module, sample: Sample, weights: Losses) -> Measured:
    """Run teacher and student on a sample and compare, inside `features.recording`.

    Every loss is measured, weighted or not, except that the teacher runs only if it has a part in the total.

    Args:
        model: the student as wrapped for training.
    """
    expected, expected_features = _teacher(context, sample) if weights.output or weights.feature else (None, {})
    with recorded(context.student) as features:
        found = context.predict(model, sample)
    parts = {"task": F.mse_loss(found.float(), sample.target.float())}
    sites: dict[str, Tensor] = {}
    if expected is not None:
        parts["output"] = F.mse_loss(found.float(), expected.float())
        sites = {path: relative_error(features[path], expected_features[path]).mean() for path in features}
        parts["feature"] = torch.stack(list(sites.values())).mean()
    # A weight of zero stays in the sum: the backward pass must begin at the model's output, where wrappers start it.
    total = torch.stack([getattr(weights, name) * loss for name, loss in parts.items()]).sum()
    return Measured(total, *({name: loss.detach() for name, loss in found.items()} for found in (parts, sites)))


@torch.no_grad()
def _teacher(context: Context, sample: Sample) -> tuple[Tensor, Features]:
    with context.teaching() as model, recorded(model) as features:
        prediction = context.predict(model, sample)
    return prediction, features
