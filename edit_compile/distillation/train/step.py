"""The gradients of one step, over all its forwards: of the warm start, and of a stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from edit_compile.distillation.context import Context, Sample
from edit_compile.distillation.recipe.schema import Losses
from edit_compile.distillation.train.distributed import reshard
from edit_compile.distillation.train.layerwise import fitting
from edit_compile.distillation.train.losses import distillation_losses
from edit_compile.distillation.train.metrics import Average
from edit_compile.student.site import is_sharded


def warm_start_gradients(
    context: Context, trained: Mapping[str, nn.Parameter], samples: Iterator[Sample], forwards: int
) -> dict[str, Tensor]:
    """Leave a step's gradients in the trained parameters, averaged over processes; returns its losses."""
    sites: dict[str, Tensor] = {}
    for _ in range(forwards):
        sample = context.on_device(next(samples))  # a source may run the student itself for it
        with fitting(context.student, 1 / forwards) as measured:
            context.predict(context.student, sample)
        sites = {path: sites.get(path, 0) + loss for path, loss in measured.items()}
    reshard(context.student)
    for parameter in trained.values():
        if parameter.grad is not None and not is_sharded(parameter):
            parameter.grad = context.accelerator.reduce(parameter.grad, "mean")
    loss = torch.stack(list(sites.values())).mean()
    return {"loss": loss, "feature": loss, **_named(sites)}


def stage_gradients(context: Context, model: nn.Module, samples: Iterator[Sample], forwards: int, weights: Losses) -> dict[str, Tensor]:
    """Leave a step's gradients in the trained parameters; returns its losses.

    Args:
        model: the student as wrapped; processes exchange gradients in the last forward's backward only.
    """
    accelerator, average = context.accelerator, Average()
    for number in range(forwards):
        last = number == forwards - 1
        with nullcontext() if last or accelerator.num_processes == 1 else accelerator.no_sync(model):
            measured = distillation_losses(context, model, context.on_device(next(samples)), weights)
            accelerator.backward(measured.total / forwards)
        average.add({"loss": measured.total.detach(), **measured.parts, **_named(measured.sites)})
    return {name: total / forwards for name, total in average.sums.items()}


def _named(sites: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"feature/{path}": loss for path, loss in sites.items()}
