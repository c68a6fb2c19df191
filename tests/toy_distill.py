"""A distillation small enough for tests: a toy model, and data that is a function of the position."""

from __future__ import annotations

import copy
from functools import cache

import torch

import edit_compile as ec
import toy
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.distillation import Recipe
from edit_compile.distillation.context import Context
from edit_compile.distillation.data import Batch
from edit_compile.distillation.data.seeding import noise_for

TEXT = 5


class ToySource:
    """Smooth random images with random text, by position."""

    concurrent = True

    def __init__(self, shift=0.0):
        self.shift = shift
        self.skipped = {}
        self.requests = []

    def check(self, height, width):
        pass

    def batch(self, request):
        self.requests.append(request)
        coarse = noise_for(request.positions, (3, 3, 3), 1, request.split)
        images = torch.nn.functional.interpolate(coarse, (request.height, request.width), mode="bilinear") + self.shift
        return Batch(images, {"text": noise_for(request.positions, (TEXT, 6), 2, request.split)})

    def decode(self, latents):
        return (latents / 2 + 0.5).clamp(0, 1)


def denoise(model, x, times, conditions):
    """The toy takes no timestep: it comes in as brightness."""
    return model(x=x + times.view(-1, 1, 1, 1) / 1000, **conditions)


def base():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return toy.Toy(joint=True).eval()


@cache
def _student():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ec.linearize(base(), example_inputs=toy.inputs(text=TEXT))


def student():
    """A converted toy, the same at every call."""
    return copy.deepcopy(_student())


def recipe(**options):
    stage = {"resolution": [12, 16], "steps": 6, "global_batch_size": 4, "lr": 1e-3, "warmup_steps": 2}
    layerwise = {"steps": 6, "global_batch_size": 4, "lr": 2e-3, "warmup_steps": 2}
    validation = {"samples": 16, "batch_size": 8, "timestep_bins": 4}
    common = {
        "model": "toy",
        "stages": [stage],
        "layerwise": layerwise,
        "validation": validation,
        "ema_decay": 0.9,
        "log_every": 1,
        "trackers": [],
    }
    return Recipe.model_validate(common | options)


def context(model, accelerator, **options):
    flow = NoiseSchedule("rectified-flow")
    return Context(recipe(**options), model, model, ToySource(), denoise, flow, accelerator)
