"""The three losses of end-to-end distillation (EDiT, arXiv 2503.16726): task, output and feature, in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit_compile.api import teacher
from edit_compile.distill.context import Context, Sample
from edit_compile.distill.features import recorded, relative_error
from edit_compile.distill.recipe import Losses


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
    """Run teacher and student on a sample and compare. What has no weight is not computed.

    Args:
        model: the student as wrapped for training; the teacher runs in the student itself, without gradients.
    """
    with torch.no_grad(), teacher(context.student), recorded(context.student) as expected_features:
        expected = context.predict(context.student, sample) if weights.output or weights.feature else None
    with recorded(context.student) as features:
        found = context.predict(model, sample)
    parts: dict[str, Tensor] = {}
    sites: dict[str, Tensor] = {}
    if weights.task:
        parts["task"] = F.mse_loss(found.float(), sample.target.float())
    if weights.output and expected is not None:
        parts["output"] = F.mse_loss(found.float(), expected.float())
    if weights.feature:
        sites = {path: relative_error(features[path], expected_features[path]).mean() for path in features}
        parts["feature"] = torch.stack(list(sites.values())).mean()
    total = torch.stack([getattr(weights, name) * loss for name, loss in parts.items()]).sum()
    return Measured(total, *({name: loss.detach() for name, loss in found.items()} for found in (parts, sites)))
