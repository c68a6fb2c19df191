"""Noise, timesteps and targets, against diffusers' schedulers."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

import edit_compile as ec
from edit_compile.adapters.noise_schedule import NoiseSchedule, default_schedule, schedule_of
from edit_compile.distillation.data.seeding import low_discrepancy, noise_for


def pictures_and_noise():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 2, 3, 4, generator=generator), torch.randn(5, 2, 3, 4, generator=generator)


def test_noise_is_a_function_of_the_position():
    whole = noise_for(range(10, 16), (2, 3), 0, "train")
    assert torch.equal(whole, torch.cat([noise_for(range(10, 12), (2, 3), 0, "train"), noise_for(range(12, 16), (2, 3), 0, "train")]))
    for other in (noise_for(range(10, 16), (2, 3), 1, "train"), noise_for(range(10, 16), (2, 3), 0, "validation")):
        assert not torch.isclose(whole, other).any()
    many = noise_for(range(4000), (4,), 0, "train")
    assert abs(many.mean()) < 0.05
    assert abs(many.std() - 1) < 0.05


def test_timesteps_are_spread_evenly_and_by_position():
    u = low_discrepancy(range(100), 0)
    assert torch.equal(u[40:50], low_discrepancy(range(40, 50), 0))
    assert torch.histc(u.float(), 10, 0, 1).sub(10).abs().max() <= 1
    assert not torch.equal(u, low_discrepancy(range(100), 1))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_a_discrete_schedule_is_diffusers_own(kind, prediction):
    scheduler = getattr(diffusers, kind)(beta_schedule="scaled_linear", prediction_type=prediction)
    schedule = schedule_of({**scheduler.config, "_class_name": kind})
    times = torch.tensor([0, 1, 500, 998, 999])
    x, noise = pictures_and_noise()
    mixed, target = schedule.add_noise(x, noise, times.float())
    reference = diffusers.DDPMScheduler(beta_schedule="scaled_linear")
    torch.testing.assert_close(mixed, reference.add_noise(x, noise, times), atol=1e-6, rtol=1e-6)
    expected = noise if prediction == "epsilon" else reference.get_velocity(x, noise, times)
    torch.testing.assert_close(target, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_is_diffusers_own(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = schedule_of({**scheduler.config, "_class_name": "FlowMatchEulerDiscreteScheduler"})
    times = schedule.timesteps(1 - torch.arange(1000, dtype=torch.float64) / 1000)
    torch.testing.assert_close(times, scheduler.timesteps, atol=1e-3, rtol=1e-5)
    x, noise = pictures_and_noise()
    some = scheduler.timesteps[[0, 10, 400, 990, 999]]
    mixed, target = schedule.add_noise(x, noise, some)
    torch.testing.assert_close(mixed, scheduler.scale_noise(x, some, noise), atol=1e-6, rtol=1e-6)
    assert torch.equal(target, noise - x)


@pytest.mark.parametrize("tokens", [1024, 4096, 16384])
def test_a_shift_that_depends_on_the_tokens_is_the_pipelines_own(tokens):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=4096, base_shift=0.5, max_shift=1.15, shift=3.0
    )
    schedule = schedule_of({**scheduler.config, "_class_name": "FlowMatchEulerDiscreteScheduler"})
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.1], mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    times = schedule.at(tokens).timesteps(torch.tensor([1.0, 0.75, 0.5, 0.1], dtype=torch.float64))
    torch.testing.assert_close(times, scheduler.timesteps, atol=1e-3, rtol=1e-5)


def test_flow_prediction_of_another_scheduler_is_a_flow():
    config = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0).config
    assert schedule_of({**config, "_class_name": "DPMSolverMultistepScheduler"}) == NoiseSchedule("rectified-flow", None, 3.0)


def test_timesteps_of_a_discrete_schedule_are_whole_and_in_range():
    times = default_schedule("epsilon").timesteps(low_discrepancy(range(5000), 0))
    assert torch.equal(times, times.round())
    assert times.min() >= 0
    assert times.max() == 999


def test_logit_normal_times_have_its_quartiles():
    times = NoiseSchedule("rectified-flow").timesteps((torch.arange(4000).double() + 0.5) / 4000, "logit-normal") / 1000
    expected = torch.tensor([-0.67448975, 0.0, 0.67448975]).sigmoid()
    torch.testing.assert_close(times.quantile(torch.tensor([0.25, 0.5, 0.75])), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "NoScheduler"}, "has no scheduler 'NoScheduler'"),
        ({"_class_name": "DDPMScheduler", "prediction_type": "sample"}, "predicts 'sample'; known: epsilon"),
    ],
)
def test_an_unknown_schedule_says_what_is_known(config, message):
    with pytest.raises(ec.DistillError, match=message):
        schedule_of(config)
