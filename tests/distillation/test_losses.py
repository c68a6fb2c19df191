"""The three losses, and the held-out error, against float64 references."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import compute_loss_weighting_for_sd3

import edit_compile as ec
import toy
import toy_distill
from edit_compile.adapters.noise_schedule import NoiseSchedule, default_schedule
from edit_compile.distillation.data import BatchRequest
from edit_compile.distillation.evaluate.validation import validate
from edit_compile.distillation.recipe.schema import Stage
from edit_compile.distillation.train.features import captured, relative_error
from edit_compile.distillation.train.step import measure_losses
from edit_compile.student.site import converted_sites

pytestmark = pytest.mark.usefixtures("compiled_once")

H, W = 12, 16


@pytest.fixture(scope="module")
def context():
    return toy_distill.context(toy_distill.student(), Accelerator())


@pytest.fixture(scope="module")
def sample(context):
    return context.noisy_batch(BatchRequest(40, 4, range(4), H, W))


def test_each_loss_is_what_it_says(context, sample):
    weights = {"task": 0.3, "output": 2, "feature": 0.7}
    measured = measure_losses(context, context.student, sample, weights)
    with torch.no_grad(), captured(context.student) as features:
        found = context.predict(context.student, sample).double()
    with torch.no_grad(), ec.teacher(context.student), captured(context.student) as targets:
        expected = context.predict(context.student, sample).double()
    by_site = {
        path: np.mean(
            [
                np.sum((f - t) ** 2) / np.sum(t**2)
                for f, t in zip(features[path][0].double().numpy(), targets[path][0].double().numpy(), strict=True)
            ]
        )
        for path in converted_sites(context.student)
    }
    parts = {
        "task": ((found - sample.target.double()) ** 2).mean().item(),
        "output": ((found - expected) ** 2).mean().item(),
        "feature": np.mean(list(by_site.values())),
    }
    assert {name: value.item() for name, value in measured.parts.items()} == pytest.approx(parts, rel=1e-4)
    assert {name: value.item() for name, value in measured.sites.items()} == pytest.approx(by_site, rel=1e-4)
    assert measured.total.item() == pytest.approx(0.3 * parts["task"] + 2 * parts["output"] + 0.7 * parts["feature"], rel=1e-4)
    assert measured.total.requires_grad


@pytest.mark.parametrize(("weight", "kept"), [({"task": 1}, "task"), ({"output": 1}, "output"), ({"feature": 1}, "feature")])
def test_without_weight_a_loss_adds_nothing_and_no_teacher_runs(context, sample, weight, kept):
    measured = measure_losses(context, context.student, sample, {"task": 0, "output": 0, "feature": 0, **weight})
    assert ("output" in measured.parts) == ("feature" in measured.parts) == (kept != "task")
    assert torch.equal(measured.total.detach(), measured.parts[kept])


def test_feature_gradients_reach_the_sites(context, sample):
    measured = measure_losses(context, context.student, sample, {"task": 0, "output": 0, "feature": 1})
    site = converted_sites(context.student)["blocks.0.attn"]
    (gradient,) = torch.autograd.grad(measured.total, [site.to_q.weight])
    assert gradient.abs().sum() > 0


def test_the_mean_does_not_depend_on_how_a_batch_is_divided(context):
    def feature(rows):
        sample = context.noisy_batch(BatchRequest(8, 4, rows, H, W))
        return measure_losses(context, context.student, sample, {"task": 1, "output": 1, "feature": 1}).total.detach()

    torch.testing.assert_close(feature(range(4)), (feature(range(2)) + feature(range(2, 4))) / 2, rtol=1e-5, atol=0)


def test_relative_error_in_half_precision_is_computed_in_float32():
    a, b = torch.full((2, 300, 300), 8.0, dtype=torch.float16), torch.full((2, 300, 300), 16.0, dtype=torch.float16)
    torch.testing.assert_close(relative_error([a], [b]), torch.full((2,), 0.25))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_held_out_error_is_the_formula(context, shift):
    context = dataclasses.replace(context, schedule=NoiseSchedule("rectified-flow", shift=shift))
    measured = validate(context, H, W)
    samples = context.recipe.validation.samples
    times = context.schedule.timesteps((torch.arange(samples).double() + 0.5) / samples)
    sample = context.noisy_batch(BatchRequest(0, samples, range(samples), H, W, "validation"), times)
    with torch.no_grad():
        student = context.predict(context.student, sample).double()
        with ec.teacher(context.student):
            expected = context.predict(context.student, sample).double()

    def error(which):
        s, t = student[which], expected[which]
        return ((s - t) ** 2).sum().item() / ((t - t.mean()) ** 2).sum().item()

    assert measured.samples == samples
    assert measured.total == pytest.approx(error(slice(None)), rel=1e-4)
    for number, bucket in enumerate(measured.bins):
        assert bucket.error == pytest.approx(error(slice(4 * number, 4 * number + 4)), rel=1e-4)
        own = times[4 * number : 4 * number + 4]
        assert bucket.low < own.min()
        assert own.max() < bucket.high
        even = torch.tensor([number / 4, (number + 1) / 4])
        torch.testing.assert_close(torch.tensor([bucket.low, bucket.high]), 1000 * shift * even / (1 + (shift - 1) * even))


def test_held_out_samples_are_not_training_samples(context):
    train = context.noisy_batch(BatchRequest(0, 2, range(2), H, W))
    held = context.noisy_batch(BatchRequest(0, 2, range(2), H, W, "validation"), train.timesteps)
    assert not torch.isclose(train.x, held.x).all(1).any()


def test_held_out_error_of_a_teacher_without_trained_weights_is_refused():
    base = toy_distill.base()
    torch.nn.init.zeros_(base.out.weight)
    torch.nn.init.zeros_(base.out.bias)
    student = ec.linearize(base, example_inputs=toy.inputs(text=toy_distill.TEXT))
    with pytest.raises(ec.DistillError, match="the teacher predicts the same value everywhere, or NaN"):
        validate(toy_distill.context(student, Accelerator()), H, W)


def test_held_out_error_of_a_broken_student_is_refused():
    student = toy_distill.student()
    torch.nn.init.constant_(next(iter(converted_sites(student).values())).to_v.weight, torch.nan)
    with pytest.raises(ec.DistillError, match="the student predicts NaN or infinity"):
        validate(toy_distill.context(student, Accelerator()), H, W)


@pytest.mark.parametrize("kind", ["sigma-sqrt", "cosmap"])
def test_weights_of_flows_are_those_of_diffusers(kind):
    timesteps = torch.tensor([1.0, 250.0, 500.0, 990.0])
    expected = compute_loss_weighting_for_sd3(kind.replace("-", "_"), timesteps / 1000)
    torch.testing.assert_close(NoiseSchedule("rectified-flow").loss_weights(kind, timesteps, 5.0), expected)
    with pytest.raises(ec.DistillError, match=f"loss_weighting: {kind} is for models that predict a flow; this one predicts epsilon"):
        default_schedule("epsilon").loss_weights(kind, timesteps, 5.0)


@pytest.mark.parametrize("prediction", ["epsilon", "v-prediction", "rectified-flow"])
def test_min_snr_weighs_errors_of_the_clean_image(prediction):
    """Whatever is predicted, the weighted error is min(SNR, 5) times that of x_0."""
    schedule, timesteps = default_schedule(prediction), torch.tensor([30.0, 200.0, 500.0, 900.0])
    x, prediction_of, error = torch.randn(3, 4, 2, 3, 3, dtype=torch.float64)
    a, s = (level.flatten() for level in schedule._levels(timesteps, x))
    clean, _ = schedule.predict_x0_and_noise(x, prediction_of, timesteps)
    other, _ = schedule.predict_x0_and_noise(x, prediction_of + error, timesteps)
    expected = torch.minimum((a / s).square(), torch.tensor(5.0)) * (other - clean).square().flatten(1).mean(1)
    found = schedule.loss_weights("min-snr", timesteps, 5.0) * error.square().flatten(1).mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_stage_weighs_timesteps(context, sample):
    stage = Stage(resolution=[H, W], steps=1, loss_weighting="min-snr", snr_gamma=2)
    plain, weighted = (measure_losses(context, context.student, sample, {"task": 1, "output": 0}, each) for each in (None, stage))
    with torch.no_grad():
        errors = (context.predict(context.student, sample) - sample.target).square().flatten(1).mean(1)
    weights = context.schedule.loss_weights("min-snr", sample.timesteps, 2)
    assert plain.total.item() == pytest.approx(errors.mean().item(), rel=1e-5)
    assert weighted.total.item() == pytest.approx((errors * weights).mean().item(), rel=1e-5)
