"""The gradients of one step, over all its forwards: of the layerwise fit, and of a stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.distillation.context import Context, NoisyBatch
from edit_compile.distillation.recipe.schema import Stage
from edit_compile.distillation.train.distributed import reshard
from edit_compile.distillation.train.features import Features, captured
from edit_compile.distillation.train.layerwise import layerwise_fit
from edit_compile.distillation.train.losses import LOSSES, Comparison
from edit_compile.distillation.train.metrics import Average
from edit_compile.torch_internals import is_sharded

MIN_SNR_GAMMA = 5.0


@dataclass(frozen=True)
class MeasuredLosses:
    """The losses of one forward.

    Attributes:
        total: their weighted sum, to call backward on.
        parts: each on its own, without its weight and without gradient.
        sites: the relative error of every converted site by path, likewise; empty if the teacher did not run.
    """

    total: Tensor
    parts: dict[str, Tensor]
    sites: dict[str, Tensor]


def measure_losses(
    context: Context, model: nn.Module, batch: NoisyBatch, weights: Mapping[str, float], stage: Stage | None = None
) -> MeasuredLosses:
    """Run teacher and student on a batch and compare them.

    Every loss in `weights` is measured, also with weight 0, except that the teacher runs only if it has a part in the total,
    and losses against the target are left out where the data does not tell it.

    Args:
        model: the student as wrapped for training.
        stage: says how timesteps are weighed; None: alike.
    """
    losses = {name: LOSSES.get(name) for name in weights}
    if batch.target is None:
        losses = {name: loss for name, loss in losses.items() if not loss.needs_target}
    needs_teacher = any(weights[name] and loss.needs_teacher for name, loss in losses.items())
    teacher, teacher_features = _run_teacher(context, batch) if needs_teacher else (None, {})
    with captured(context.student) as features:
        prediction = context.predict(model, batch)
    target = None if batch.target is None else batch.target.float()
    by_timestep = None if stage is None else weights_of_timesteps(stage, context.schedule, batch.timesteps)
    comparison = Comparison(prediction.float(), target, batch.timesteps, features, teacher, teacher_features, by_timestep)
    parts = {name: loss.compute(comparison) for name, loss in losses.items() if needs_teacher or not loss.needs_teacher}
    # A weight of zero stays in the sum: the backward pass must begin at the model's output, where wrappers start it.
    total = torch.stack([weights[name] * loss for name, loss in parts.items()]).sum()
    return MeasuredLosses(total, _detached(parts), _detached(comparison.site_errors))


def weights_of_timesteps(stage: Stage, schedule: NoiseSchedule, timesteps: Tensor) -> Tensor | None:
    """Weigh timesteps (B,) as a stage says; returns (B,), or None where all weigh the same.

    Raises:
        DistillError: the weighting is for flows only, and the model predicts something else.
    """
    if stage.loss_weighting == "none":
        return None
    return schedule.loss_weights(stage.loss_weighting, timesteps, stage.snr_gamma or MIN_SNR_GAMMA)


@torch.no_grad()
def _run_teacher(context: Context, batch: NoisyBatch) -> tuple[Tensor, Features]:
    with context.teacher_mode() as model, captured(model) as features:
        prediction = context.predict(model, batch)
    return prediction.float(), features


def _detached(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: loss.detach() for name, loss in losses.items()}


def layerwise_gradients(
    context: Context, trained: Mapping[str, nn.Parameter], batches: Iterator[NoisyBatch], forwards: int
) -> dict[str, Tensor]:
    """Leave a step's gradients in the trained parameters, averaged over processes; returns its losses."""
    sites: dict[str, Tensor] = {}
    for _ in range(forwards):
        batch = context.on_device(next(batches))  # a source may run the student itself for it
        with layerwise_fit(context.student, 1 / forwards) as measured:
            context.predict(context.student, batch)
        sites = {path: sites.get(path, 0) + loss for path, loss in measured.items()}
    reshard(context.student)
    for parameter in trained.values():
        if parameter.grad is not None and not is_sharded(parameter):
            parameter.grad = context.accelerator.reduce(parameter.grad, "mean")
    loss = torch.stack(list(sites.values())).mean()
    return {"loss": loss, "feature": loss, **_named(sites)}


def stage_gradients(
    context: Context,
    model: nn.Module,
    batches: Iterator[NoisyBatch],
    forwards: int,
    weights: Mapping[str, float],
    stage: Stage | None = None,
) -> dict[str, Tensor]:
    """Leave a step's gradients in the trained parameters; returns its losses.

    Args:
        model: the student as wrapped; processes exchange gradients in the last forward's backward only.
        stage: as of `measure_losses`.
    """
    accelerator, average = context.accelerator, Average()
    for number in range(forwards):
        last = number == forwards - 1
        with nullcontext() if last or accelerator.num_processes == 1 else accelerator.no_sync(model):
            measured = measure_losses(context, model, context.on_device(next(batches)), weights, stage)
            accelerator.backward(measured.total / forwards)
        average.add({"loss": measured.total.detach(), **measured.parts, **_named(measured.sites)})
    return {name: total / forwards for name, total in average.sums.items()}


def _named(sites: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"feature/{path}": loss for path, loss in sites.items()}
