"""A dry run's numbers are those of the run."""

from __future__ import annotations

import copy
import json
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from click.testing import CliRunner
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import edit_compile as ec
from edit_compile.adapters import load_model as models
from edit_compile.adapters.denoise import denoise
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.bench import peak_memory
from edit_compile.cli import main
from edit_compile.distillation import Recipe
from edit_compile.distillation import dry_run as module
from edit_compile.distillation.context import Context, NoisyBatch, trained_parameters
from edit_compile.distillation.data import BatchRequest, open_source
from edit_compile.distillation.models import Student
from edit_compile.distillation.train.optimizer import muon_matrices
from edit_compile.distillation.train.step import measure_losses
from edit_compile.distillation.train.train_context import only_trainable
from edit_compile.student.site import converted_sites

pytestmark = pytest.mark.usefixtures("compiled_once")

SMALL = {
    "sd3.5-medium": {"num_layers": 2, "dual_attention_layers": [0], "joint_attention_dim": 48, "caption_projection_dim": 128},
    "flux-dev": {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 48},
    "pixart-sigma": {"num_layers": 2, "caption_channels": 48, "cross_attention_dim": 144},
}


@cache
def student_of(name):
    """A converted model of the architecture, narrow and short, with random weights."""
    content = json.loads((models.ARCHITECTURES / f"{name}.json").read_text())
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(content | SMALL[name] | {"num_attention_heads": 2}))
        torch.manual_seed(0)
        return ec.linearize(models.load_model(str(path), random_weights=True).model)


def tried(name, *, devices=1, device=None, **options):
    """The recipe, and its dry run: of a model that was converted before, for conversion takes most of the time."""
    stage = {"resolution": [64, 96], "steps": 7, "global_batch_size": 4, "micro_batch_size": 2}
    recipe = Recipe.model_validate({"model": name, "data": {"kind": "random"}, "stages": [stage]} | options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "make_student", lambda recipe, structure_only: Student(student_of(name), None))
        return recipe, module.dry_run(recipe, devices=devices, device=device)


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
    assert state(train="all") == 4 * (5 * parameters + parameters - trained + originals)
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


def test_stages_below_min_tokens_are_told_and_counted_as_they_train():
    _, before = tried("pixart-sigma")
    student = copy.deepcopy(student_of("pixart-sigma"))
    ec.set_min_tokens(student, 30)
    stages = [{"resolution": [64, 96], "steps": 7, "global_batch_size": 4, "micro_batch_size": 2}, {"resolution": 128, "steps": 1}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "make_student", lambda recipe, structure_only: Student(student, None))
        found = module.dry_run(Recipe.model_validate({"model": "a", "data": {"kind": "random"}, "stages": stages}))
    assert found.phases[0] == before.phases[0]
    assert found.to_dict()["notes"] == list(found.notes)
    assert [note.partition(", where")[0] for note in found.notes] == ["stages.0 trains with 24 image tokens"]


def test_the_least_time_is_flops_over_speed():
    _, found = tried("sd3.5-medium")
    (phase,) = found.phases
    assert found.least_seconds(phase) == pytest.approx(7 * phase.flops / found.flops_per_second)
    assert found.to_dict()["phases"][0]["least_seconds"] == found.least_seconds(phase)


def test_several_devices_share_the_work_and_if_sharded_the_student():
    _, one = tried("pixart-sigma")
    _, four = tried("pixart-sigma", devices=2)
    (alone,), (shared,) = one.phases, four.phases
    assert shared.flops == alone.flops
    assert four.least_seconds(shared) == pytest.approx(one.least_seconds(alone) / 2 * one.flops_per_second / four.flops_per_second)
    assert alone.sharded_bytes == alone.bytes == shared.bytes  # two samples a forward, either way
    student = student_of("pixart-sigma")
    trained = trained_parameters(student, "attention")
    own = 4 * sum(p.numel() for p in student.parameters()) + 16 * sum(p.numel() for p in trained.values())
    gathered = 4 * max(sum(p.numel() for p in block.parameters()) for block in student.transformer_blocks)
    originals = 4 * sum(p.numel() for site in converted_sites(student).values() for p in site.edit_teacher.parameters())
    for compiled, sharded in ((True, own), (False, own + originals)):
        (shared,) = tried("pixart-sigma", devices=2, compile=compiled)[1].phases
        assert shared.bytes - shared.sharded_bytes == sharded - sharded // 2 - 2 * gathered
    with pytest.raises(ec.DistillError, match="global_batch_size 4 is not divisible by 3 processes times micro_batch_size 2"):
        tried("pixart-sigma", devices=3)


def test_a_device_that_is_not_here_counts_by_its_data_sheet():
    _, found = tried("pixart-sigma", device="H100", precision="bf16")
    assert found.device.bytes == 80 * 2**30
    assert found.least_seconds(found.phases[0]) == 7 * found.phases[0].flops / 989e12
    assert tried("pixart-sigma", device="h100")[1].flops_per_second == 67e12  # float32
    with pytest.raises(ec.ConfigError, match=r"no device 'h10' is known; did you mean h100\?"):
        tried("pixart-sigma", device="h10")


@pytest.mark.parametrize("columns", ["80", "200"])
def test_the_command_shows_devices_and_refuses_them_without_a_dry_run(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    _, found = tried("pixart-sigma", devices=2, device="l4", precision="bf16")
    monkeypatch.setattr(module, "dry_run", lambda recipe, devices, device: found)
    shown = CliRunner().invoke(main, ["distill", "pixart-sigma", "--dry-run", "--devices", "2", "--device", "l4"])
    assert shown.exit_code == 0, shown.output
    words = shown.stdout.split()
    assert "at the peak of a step on each of 2 devices" in " ".join(words)
    assert "l4: 24.0 GiB a device. The least time is at 121 TFLOP/s" in " ".join(words)
    assert {"phase", "pixels", "steps", "samples", "FLOPs", "memory", "sharded", "least", "usual"} <= set(words)
    assert "…" not in shown.stdout
    refused = CliRunner().invoke(main, ["distill", "pixart-sigma", "--devices", "2"])
    assert refused.exit_code == 2
    assert "--devices and --device are for --dry-run" in refused.stderr
