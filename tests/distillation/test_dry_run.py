"""A dry run's numbers are those of the run."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import edit_compile as ec
from edit_compile.adapters import load_model as models
from edit_compile.adapters.denoise import denoise
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.bench import peak_memory
from edit_compile.distillation import Recipe
from edit_compile.distillation import dry_run as module
from edit_compile.distillation.context import Context, NoisyBatch, trained_parameters
from edit_compile.distillation.data import BatchRequest, open_source
from edit_compile.distillation.models import Student
from edit_compile.distillation.train.optimizer import muon_matrices
from edit_compile.distillation.train.step import measure_losses
from edit_compile.distillation.train.train_context import only_trainable
from edit_compile.student.site import converted_sites

SMALL = {
    "sd3.5-medium": {"num_layers": 2, "dual_attention_layers": [0], "joint_attention_dim": 48, "caption_projection_dim": 128},
    "flux-dev": {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 48},
    "pixart-sigma": {"num_layers": 2, "caption_channels": 48, "cross_attention_dim": 144},
}


@cache
def student_of(name):
    """A converted model of the architecture, narrow and short, with random weights."""
    content = json.loads((models._ARCHITECTURES / f"{name}.json").read_text())
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(content | SMALL[name] | {"num_attention_heads": 2}))
        torch.manual_seed(0)
        return ec.linearize(models.load_model(str(path), random_weights=True).model)


def tried(name, **options):
    """The recipe, and its dry run: of a model that was converted before, for conversion takes most of the time."""
    stage = {"resolution": [64, 96], "steps": 7, "global_batch_size": 4, "micro_batch_size": 2}
    recipe = Recipe.model_validate({"model": name, "data": {"kind": "random"}, "stages": [stage]} | options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "make_student", lambda recipe, structure_only: Student(student_of(name), None))
        return recipe, module.dry_run(recipe)


def measured(recipe):
    """FLOPs and bytes of one forward and backward of the real model, gradients in place."""
    student, stage = student_of(recipe.model), recipe.stages[0]
    source = open_source(recipe.data, student, 0)
    batch = source.batch(BatchRequest(0, stage.micro_batch_size, range(stage.micro_batch_size), *stage.resolution))
    context = Context(recipe, student, student, source, denoise, NoiseSchedule("rectified-flow"), Accelerator(cpu=True))
    sample = NoisyBatch(batch.latents, torch.full((stage.micro_batch_size,), 500.0), batch.conditions, batch.latents)

    def call():
        measure_losses(context, student, sample, stage.losses).total.backward()

    with only_trainable(student, set(trained_parameters(student, recipe.train))):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the CPU's kernel is not counted
            call()
        return counter.get_total_flops(), peak_memory(call)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "flux-dev")) for name in SMALL])
def test_flops_and_memory_are_those_of_a_step(name):
    recipe, found = tried(name)
    (phase,), student = found.phases, student_of(name)
    flops, activations = measured(recipe)
    assert (phase.name, phase.height, phase.width, phase.steps, phase.samples, phase.micro_batch) == ("stage 0", 64, 96, 7, 4, 2)
    assert phase.flops == 2 * flops  # two forwards a step
    trained = sum(p.numel() for p in trained_parameters(student, "attention").values())
    originals = sum(p.numel() for site in converted_sites(student).values() for p in site.edit_teacher.parameters())
    whole = sum(p.numel() for p in student.parameters())
    kept = 4 * (whole + originals + 4 * trained)  # gradient, two moments, average
    assert phase.bytes - kept == pytest.approx(activations, rel=0.02)


def test_what_is_kept_by_option():
    def state(**options):
        return tried("pixart-sigma", **options)[1].state_bytes

    base = tried("pixart-sigma")[1]
    parameters, trained = base.parameters, base.trained
    originals = base.state_bytes // 4 - parameters - 4 * trained
    assert 0 < originals < trained
    assert state(precision="bf16") == 20 * trained + 2 * (parameters - trained + originals)
    assert state(optimizer={"kind": "adamw-8bit"}) == base.state_bytes - 6 * trained
    assert state(ema_decay=None) == base.state_bytes - 4 * trained
    assert state(train="all") == 4 * (5 * parameters + parameters + 2 * originals)
    lora = tried("pixart-sigma", train="lora", lora={"rank": 4, "targets": ["*.ff.*", "proj_out"]})[1]
    added = lora.trained - trained
    assert added == sum(4 * (linear.in_features + linear.out_features) for linear in adapted("pixart-sigma"))
    assert lora.state_bytes == base.state_bytes + 4 * 5 * added
    blocks = tried("pixart-sigma", train="blocks")[1]
    outside = blocks.trained - trained
    assert blocks.trained == sum(p.numel() for p in student_of("pixart-sigma").transformer_blocks.parameters())
    assert blocks.state_bytes == base.state_bytes + 4 * (4 * outside + outside)
    matrices = sum(
        p.numel() for p in muon_matrices(student_of("pixart-sigma"), trained_parameters(student_of("pixart-sigma"), "blocks")).values()
    )
    assert state(train="blocks", optimizer={"kind": "muon"}) == blocks.state_bytes - 4 * matrices


def adapted(name):
    """The Linears of the feed-forward networks, and the last one."""
    blocks = student_of(name).transformer_blocks
    return [
        *(module for block in blocks for module in block.ff.modules() if isinstance(module, torch.nn.Linear)),
        student_of(name).proj_out,
    ]


def test_recomputing_takes_time_for_memory():
    (plain,), (recomputed,) = (tried("sd3.5-medium", gradient_checkpointing=on)[1].phases for on in (False, True))
    assert plain.flops < recomputed.flops < 1.5 * plain.flops
    assert recomputed.bytes < plain.bytes


def test_a_layerwise_fit_costs_no_backward_through_the_model():
    warm, stage = tried("sd3.5-medium", layerwise={"steps": 3, "global_batch_size": 4, "micro_batch_size": 2})[1].phases
    assert (warm.name, warm.height, warm.width) == ("layerwise fit", 64, 96)
    assert warm.flops < 0.8 * stage.flops
    assert warm.bytes < stage.bytes


def test_a_resolution_that_the_model_cannot_draw_is_named():
    _, found = tried("sd3.5-medium", stages=[{"resolution": [64, 96], "steps": 1}, {"resolution": [64, 100], "steps": 1}])
    assert [phase.name for phase in found.phases] == ["stage 0"]
    assert "does not support 64 x 100 px: both sides must be multiples of 16" in found.errors["stage 1"]


def test_the_least_time_is_flops_over_speed():
    _, found = tried("sd3.5-medium")
    (phase,) = found.phases
    assert found.least_seconds(phase) == pytest.approx(7 * phase.flops / found.flops_per_second)
    assert found.to_dict()["phases"][0]["least_seconds"] == found.least_seconds(phase)
