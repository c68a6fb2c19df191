"""Caches of diffusers across sampling steps, on students: what they skip, what they change, and what is refused beside them.

Where a cache skips nothing, outputs are the student's bit for bit; where it skips, they are near, and fewer sites run.
"""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)

import edit_compile as ec
import toy
from edit_compile.student.site import converted_sites
from families import COLUMNS, FAMILIES, ROWS

STEPS = 8
NEVER, BUT_THE_FIRST, ALWAYS = (2000, 3000), (-1, 990), (-1, 1001)  # ranges of timesteps in which attention may be skipped


@pytest.fixture(scope="module")
def student():
    """A student of a small FLUX with random weights, two blocks of each kind, whose sites are away from their start."""
    model, inputs = FAMILIES["flux"]()
    made = ec.linearize(model, example_inputs=inputs)
    toy.shaken(torch.nn.ModuleList(converted_sites(made).values()), amount=0.1)
    return made


class Sampler:
    """Follows a model's velocity in equal steps; counts how often its converted sites run."""

    def __init__(self, model):
        self.model, self.now, self.calls = model, 1000.0, 0
        for site in converted_sites(model).values():
            site.edit.register_forward_hook(self.count)

    def count(self, *_):
        self.calls += 1

    @torch.no_grad()
    def __call__(self):
        inputs = FAMILIES["flux"]()[1]
        x, self.calls = inputs.pop("hidden_states"), 0
        for step in range(STEPS):
            self.now = 1000 * (1 - step / STEPS)
            place = {"step_index": step, "num_inference_steps": STEPS, "sigma": self.now / 1000}
            with self.model.cache_context("cond", **place):
                time = torch.full((len(x),), self.now / 1000)
                x = x - self.model(**{**inputs, "hidden_states": x, "timestep": time})[0] / STEPS
        return x


def configurations(sampler, skips):
    now = {"current_timestep_callback": lambda: sampler.now}
    spatial = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": ALWAYS if skips else NEVER}
    later = {**spatial, "spatial_attention_timestep_skip_range": BUT_THE_FIRST if skips else NEVER}
    every = ("transformer_blocks.*attn", "single_transformer_blocks.*attn")
    return {
        "first block": FirstBlockCacheConfig(threshold=10.0 if skips else -1.0),
        "pyramid": PyramidAttentionBroadcastConfig(**spatial, **now),
        "faster": FasterCacheConfig(
            **later, **now, spatial_attention_block_identifiers=every, is_guidance_distilled=True, tensor_format="BCHW"
        ),
        "taylor": TaylorSeerCacheConfig(cache_interval=2 if skips else 1, disable_cache_before_step=2, taylor_factors_dtype=torch.float32),
        "mag": MagCacheConfig(threshold=1.0 if skips else -1.0, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS),
        "sea": SeaCacheConfig(threshold=10.0 if skips else 0.0, raw_vision_callback=vision),
    }


def vision(module, args, kwargs):
    return [sample.T[:, None, None] for sample in kwargs["hidden_states"]]


KINDS = list(configurations(None, True))
CLOSE = {"first block": 0.5, "pyramid": 0.1, "faster": 0.1, "taylor": 0.1, "mag": 0.5, "sea": 0.5}  # relative to the plain student's result


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_skips_nothing_changes_nothing(student, kind):
    sampler = Sampler(copy.deepcopy(student))
    expected, calls = sampler(), sampler.calls
    sampler.model.enable_cache(configurations(sampler, False)[kind])
    assert torch.equal(sampler(), expected)
    assert sampler.calls == calls == STEPS * len(converted_sites(student))
    sampler.model.disable_cache()
    assert torch.equal(sampler(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_skips_runs_fewer_sites_and_stays_near(student, kind):
    sampler = Sampler(copy.deepcopy(student))
    expected, calls = sampler(), sampler.calls
    sampler.model.enable_cache(configurations(sampler, True)[kind])
    got = sampler()
    error = (got - expected).norm() / expected.norm()
    assert 0 < error < CLOSE[kind]
    assert sampler.calls < calls


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_refused_beside_a_cache_which_would_mix_the_two(student, kind):
    sampler = Sampler(copy.deepcopy(student))
    sampler.model.enable_cache(configurations(sampler, True)[kind])
    with pytest.raises(ec.EditCompileError, match=r"has a cache of sampling steps \(\w+\)"), ec.teacher(sampler.model):
        pass
    sampler.model.disable_cache()
    with ec.teacher(sampler.model):
        sampler()


@pytest.mark.parametrize("skips", [False, True])
def test_cache_dit_on_a_student_whose_grid_is_stated(student, skips):
    """cache-dit calls FLUX's blocks from a forward of its own, so that the model's does not read the grid."""
    cache_dit = pytest.importorskip("cache_dit")
    sampler = Sampler(copy.deepcopy(student))
    expected, calls = sampler(), sampler.calls
    options = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 2, "enable_separate_cfg": False}
    config = cache_dit.DBCacheConfig(num_inference_steps=STEPS, residual_diff_threshold=10.0 if skips else 1e-12, **options)
    cache_dit.enable_cache(sampler.model, cache_config=config)
    with pytest.raises(ec.GridError, match=r"ran outside the model's forward.*wrap the call in edit_compile\.grid"):
        sampler()
    cache_dit.refresh_context(sampler.model, cache_config=config)
    with ec.grid(sampler.model, ROWS, COLUMNS):
        got = sampler()
    assert (sampler.calls < calls) is skips
    error = (got - expected).norm() / expected.norm()
    assert (0 < error < CLOSE["first block"]) if skips else error < 1e-6
    with pytest.raises(ec.EditCompileError, match=r"has a cache of sampling steps \(cache-dit\)"), ec.teacher(sampler.model):
        pass
