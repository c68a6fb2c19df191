"""Random data, and random weights, to try a recipe with before there are any."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import edit_compile as ec
from edit_compile.adapters import load_model as models
from edit_compile.distillation import Recipe, distill
from edit_compile.distillation.data import BatchRequest, open_source
from edit_compile.distillation.data.seeding import noise_for
from edit_compile.distillation.data.sources.random import RandomData

pytestmark = pytest.mark.usefixtures("compiled_once")

ROOT = Path(__file__).parents[3]
SMALL = {"num_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 48, "pooled_projection_dim": 32}
NAMES = {"sd3.5-medium": {"dual_attention_layers": [], "caption_projection_dim": 128}, "flux-dev": {"num_single_layers": 1}}


def config_of(name, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads((models.ARCHITECTURES / f"{name}.json").read_text()) | SMALL | NAMES[name]))
    return str(path)


def test_the_noise_is_not_the_sample(tmp_path):
    model = models.load_model(config_of("sd3.5-medium", tmp_path)).model
    for split in ("train", "validation"):
        drawn = open_source(RandomData(kind="random"), model, 0).batch(BatchRequest(8, 2, range(2), 64, 96, split)).latents
        noise = noise_for(range(8, 10), drawn.shape[1:], 0, split)
        assert abs(torch.corrcoef(torch.stack([drawn.flatten(), noise.flatten()]))[0, 1]) < 0.1


@pytest.mark.parametrize(("name", "channels"), [("sd3.5-medium", 16), ("flux-dev", 16)])
def test_samples_are_functions_of_their_positions(name, channels, tmp_path):
    model = models.load_model(config_of(name, tmp_path)).model
    source = open_source(RandomData(kind="random"), model, 0)
    state = torch.get_rng_state()
    whole = source.batch(BatchRequest(8, 4, range(4), 64, 96))
    part = source.batch(BatchRequest(8, 4, range(1, 3), 64, 96))
    assert torch.equal(torch.get_rng_state(), state)
    assert whole.latents.shape == (4, channels, 8, 12)
    assert torch.equal(whole.latents[1:3], part.latents)
    for name, value in whole.conditions.items():
        assert value.shape[0] == 4, name
        assert torch.equal(value[1:3], part.conditions[name])
    assert not torch.equal(whole.latents[0], whole.latents[1])
    held_out = source.batch(BatchRequest(8, 4, range(4), 64, 96, "validation"))
    assert not torch.equal(whole.latents, held_out.latents)


def test_weights_are_random_by_the_seed(tmp_path):
    path = config_of("sd3.5-medium", tmp_path)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(models.load_model(path, random_weights=True))
    assert all(loaded.has_weights for loaded in found)
    first, same, other = (next(loaded.model.parameters()) for loaded in found)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not models.load_model(path).has_weights


def test_a_structure_is_distilled_on_random_data_only(tmp_path):
    stage = {"resolution": [32, 48], "steps": 1, "global_batch_size": 1}
    common = {"stages": [stage], "validation": {"samples": 1, "timestep_bins": 1}, "trackers": []}
    models.load_model("demo/dit").model.save_config(tmp_path)
    with pytest.raises(ec.DistillError, match=r"without weights to distill; data: \{kind: random\} tries speed and memory"):
        distill(Recipe.model_validate(common | {"model": str(tmp_path / "config.json")}), tmp_path / "out")
    random = {"model": config_of("flux-dev", tmp_path), "data": {"kind": "random"}}
    result = distill(Recipe.model_validate(common | random), tmp_path / "out")
    assert result.speeds[0].student > 0
    assert not (tmp_path / "out" / "samples").exists()


def test_what_a_step_costs_is_measured_at_any_size(tmp_path, monkeypatch, capsys):
    """The benchmark's full-size command, narrow and short: bfloat16, attention trained, blocks recomputed."""
    changes = [
        f"model={config_of('sd3.5-medium', tmp_path)}",
        "data={kind: random}",
        "stages.0.resolution=[96, 144]",
        "stages.0.global_batch_size=16",
    ]
    changes += ["stages.0.micro_batch_size=16", "compile=false", "validation.batch_size=1", "trackers=[]"]
    arguments = [part for change in changes for part in ("--set", change)]
    output = tmp_path / "results" / "step.md"
    monkeypatch.setattr(sys, "argv", ["training_step.py", "sd3.5-medium", "--steps", "2", *arguments, "-o", str(output)])
    runpy.run_path(str(ROOT / "benchmarks" / "training_step.py"), run_name="__main__")
    rows = [line.split("|")[1:-1] for line in output.read_text().splitlines() if line.startswith("| ")]
    found = {row[0].strip(): row[1].strip() for row in rows}
    assert float(found["seconds of a step"]) > 0
    with_teacher, alone = (float(found[name]) for name in ("the recipe's losses", "the student alone (task loss)"))
    assert 1 < with_teacher / alone < 2
    assert "bf16, train: lora, 2 steps" in output.read_text()
