"""Distillation on the teacher's own timesteps: those that its pipeline's scheduler visits."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

import edit_compile as ec
import toy_distill
from edit_compile.adapters.noise_schedule import NoiseSchedule, default_schedule, schedule_of_pipeline
from edit_compile.distillation import distill, load_recipe
from pipelines import PIPELINES

SIZE = (64, 96)


def run_by(pipe, steps):
    """The timesteps of a sampling by the pipeline itself."""
    pipe(prompt="a red fox", num_inference_steps=steps, height=SIZE[0], width=SIZE[1], output_type="latent")
    return pipe.scheduler.timesteps.float()


@pytest.mark.parametrize(
    ("family", "scheduler"),
    [
        ("sd3", FlowMatchEulerDiscreteScheduler(shift=3.0)),
        ("flux", FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)),
        ("flux", FlowMatchEulerDiscreteScheduler(shift=1.0)),
        ("pixart", DDIMScheduler(timestep_spacing="trailing")),
        ("pixart", LCMScheduler()),
    ],
    ids=["sd3", "flux", "flux-schnell", "ddim", "lcm"],
)
def test_they_are_those_of_the_pipelines_own_sampling(family, scheduler, tmp_path):
    pipe = PIPELINES[family]()
    pipe.register_modules(scheduler=scheduler)
    pipe.save_pretrained(tmp_path)
    schedule = schedule_of_pipeline(str(tmp_path))
    expected = run_by(pipe, 4)
    assert len(expected) == 4
    torch.testing.assert_close(schedule.visited(4, *SIZE), expected.sort().values, rtol=0, atol=1e-3)


def test_a_flow_without_a_pipeline_takes_eulers_steps_with_its_shift():
    sigmas = torch.tensor([0.25, 0.5, 0.75, 1.0])
    torch.testing.assert_close(NoiseSchedule("rectified-flow").visited(4, 32, 32), 1000 * sigmas)
    torch.testing.assert_close(NoiseSchedule("rectified-flow", shift=3.0).visited(4, 32, 32), 1000 * 3 * sigmas / (1 + 2 * sigmas))


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        "{}",
        "[" * 100_000,
        '{"_class_name": "SD3Transformer2DModel"}',
        '{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": "x"}',
        '{"_class_name": "DDPMScheduler", "beta_schedule": "none of them"}',
        '{"_class_name": "DDPMScheduler", "num_train_timesteps": -5}',
    ],
)
def test_a_schedulers_config_that_makes_none_is_named(tmp_path, config):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(config)
    with pytest.raises(
        ec.DistillError, match=r"scheduler_config\.json cannot be read: .*|has no scheduler .*; set prediction: in the recipe"
    ):
        schedule_of_pipeline(str(tmp_path))


def test_what_is_not_known_is_said(tmp_path):
    with pytest.raises(ec.DistillError, match="is known from its pipeline alone, and that is not known; leave prediction: auto"):
        default_schedule("epsilon").visited(4, 32, 32)
    with pytest.raises(ec.DistillError, match=r"4 steps at 32 x 32 px cannot be asked of .*: .*; use timesteps: uniform"):
        NoiseSchedule("rectified-flow", pipeline=str(tmp_path)).visited(4, 32, 32)


def distilled(folder, seen, **options):
    def denoise(model, x, times, conditions):
        seen.update(times.tolist())
        return toy_distill.denoise(model, x, times, conditions)

    stage = {"resolution": [12, 16], "steps": 8, "global_batch_size": 4, "lr": 1e-3}
    recipe = toy_distill.recipe(**{"stages": [stage], "layerwise": None, "timesteps": {"sampler_steps": 4}} | options)
    flow, source = NoiseSchedule("rectified-flow", shift=3.0), toy_distill.ToySource()
    return distill(recipe, folder, student=toy_distill.student(), source=source, denoise=denoise, schedule=flow)


def test_training_validation_and_grids_see_no_others(tmp_path):
    seen = Counter()
    result = distilled(tmp_path, seen)
    visited = NoiseSchedule("rectified-flow", shift=3.0).visited(4, 12, 16).tolist()
    assert set(seen) == set(visited)
    assert [(one.low, one.high) for one in result.after.bins] == [(t, t) for t in visited]
    assert result.after.total < result.before.total
    assert list((tmp_path / "samples").glob("*.png"))
    assert json.loads((tmp_path / "result.json").read_text())["held_out_error"]["after"]["timestep_bins"][0]["high"] == visited[0]


def test_training_sees_all_equally_often():
    from accelerate import Accelerator

    from edit_compile.distillation.data import BatchRequest

    context = toy_distill.context(toy_distill.student(), Accelerator(cpu=True), timesteps={"sampler_steps": 5})
    seen = context.noisy_batch(BatchRequest(0, 500, range(500), 12, 16)).timesteps
    assert Counter(seen.tolist()).keys() == {200.0, 400.0, 600.0, 800.0, 1000.0}
    assert all(abs(count - 100) <= 2 for count in Counter(seen.tolist()).values())


def test_more_steps_than_bins_share_them(tmp_path):
    result = distilled(tmp_path, Counter(), timesteps={"sampler_steps": 7})
    visited = NoiseSchedule("rectified-flow", shift=3.0).visited(7, 12, 16).tolist()
    assert [one.low for one in result.after.bins] == [visited[i] for i in (0, 2, 4, 6)]
    assert [one.high for one in result.after.bins] == [visited[i] for i in (1, 3, 5, 6)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("timesteps=often", "timesteps.density: 'often': Input should be 'uniform' or 'logit-normal'"),
        ("timesteps.sampler_step=4", "timesteps.sampler_step: unknown key; did you mean sampler_steps?"),
        ("timesteps={sampler_steps: 4, density: logit-normal}", "density: logit-normal has no effect with sampler_steps"),
        ("timesteps.sampler_steps=1000", "validation.samples: 512 cannot visit all of 1000 timesteps.sampler_steps"),
    ],
)
def test_wrong_options_are_named(override, message):
    with pytest.raises(ec.RecipeError) as caught:
        load_recipe("demo-mm-dit", [override])
    assert message in str(caught.value)


def test_calls_of_a_pipeline_have_timesteps_of_their_own():
    with pytest.raises(ValueError, match=r"data of kind pipeline has .* of its own samplings; set data\.call\.num_inference_steps"):
        toy_distill.recipe(data={"kind": "pipeline", "path": "prompts.txt"}, timesteps={"sampler_steps": 4})


def test_a_density_alone_is_still_a_recipe():
    recipe = load_recipe("demo-mm-dit", ["timesteps=logit-normal"])
    assert recipe.timesteps.density == "logit-normal"
    assert type(recipe).model_validate(recipe.model_dump(mode="json")) == recipe
