"""Models with their code beside their weights: exact where this package is not, readable, and refused where that cannot be."""

import ast
import copy
import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import edit_compile as ec
import toy
from edit_compile.designs.ops.kernels import choice
from edit_compile.student.site import converted_sites
from edit_compile.student.standalone import MODULE
from families import FAMILIES
from pipelines import PIPELINES, quiet

ALONE = """
import sys
sys.modules["edit_compile"] = None  # importing it fails
import torch
from diffusers import AutoModel

folder, calls = sys.argv[1:]
inputs, expected = torch.load(calls)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(model(**inputs)[0], expected)
print(type(model).__name__)
"""


def shaken(student):
    toy.shaken(nn.ModuleList(converted_sites(student).values()), amount=0.05)
    return student


def drawn_alone(student, inputs, folder):
    """Save a student, and call it in a process without this package; returns the name of its class there."""
    ec.save(student, folder, base="someone/model", standalone=True)
    with torch.no_grad():
        torch.save((inputs, student(**inputs)[0]), folder / "calls.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-c", ALONE, str(folder), str(folder / "calls.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


@pytest.fixture(scope="module")
def pixart():
    model, inputs = FAMILIES["pixart"]()
    return model, shaken(ec.linearize(model, example_inputs=inputs)), inputs


def test_without_this_package_the_output_is_the_same_bit_for_bit(pixart, tmp_path):
    model, student, inputs = pixart
    assert drawn_alone(student, inputs, tmp_path / "saved") == "LinearPixArtTransformer2DModel"
    loaded = ec.load(tmp_path / "saved", model)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], student(**inputs)[0])
    source = (tmp_path / "saved" / f"{MODULE}.py").read_text()
    imported = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert not any(name.startswith(("edit_compile", "pydantic")) for name in imported)
    assert "class SpatialCompressor(nn.Module):" in source
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3-dual", "flux", "qwen-image", "wan", "chroma"])
def test_other_grids_masks_and_designs(name, tmp_path):
    model, inputs = FAMILIES[name]()
    drawn_alone(shaken(ec.linearize(model, example_inputs=inputs)), inputs, tmp_path / "saved")


@pytest.mark.slow
@pytest.mark.parametrize("design", ["linear-mm-alpha", "linfusion", "kv-compress", "clear", "local-linear", "sana"])
def test_other_designs(design, tmp_path):
    model, inputs = FAMILIES["sd3"]()
    student = ec.linearize(model, ec.LinearizeConfig(design=design), example_inputs=inputs)
    drawn_alone(shaken(student), inputs, tmp_path / "saved")


def test_diffusers_asks_before_it_runs_the_code(pixart, tmp_path):
    _, student, _ = pixart
    ec.save(student, tmp_path, base="someone/model", standalone=True)
    name = json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModel"]
    assert name == f"{MODULE}.LinearPixArtTransformer2DModel"
    from diffusers import AutoModel

    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.slow
def test_chosen_kernels_stay_here(pixart, tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "can_run", lambda device: True)
    student = copy.deepcopy(pixart[1])
    ec.compile(student, kernels="always", backend="eager")
    assert drawn_alone(student, pixart[2], tmp_path / "saved") == "LinearPixArtTransformer2DModel"


@pytest.mark.slow
def test_a_pipeline_draws_the_same(tmp_path, monkeypatch):
    pipe = PIPELINES["sd3"]()
    student = ec.linearize(pipe)
    shaken(student.transformer)
    ec.save(student, tmp_path / "saved", base="someone/model", standalone=True)
    call = {"prompt": "a red circle", "num_inference_steps": 2, "output_type": "np", "height": 32, "width": 48}
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(tmp_path / "saved")
    alone = quiet(DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True))
    assert type(alone.transformer).__name__ == "LinearSD3Transformer2DModel"
    drawn = [each(**call, generator=torch.Generator().manual_seed(0)).images for each in (alone, student)]
    assert np.array_equal(*drawn)


def test_what_cannot_stand_alone_is_refused_before_anything_is_written(pixart, tmp_path):
    model, student, _ = pixart
    of_no_library = ec.linearize(toy.Toy().eval(), example_inputs=toy.inputs())
    with pytest.raises(ec.CheckpointError, match="Toy is not a class of diffusers"):
        ec.save(of_no_library, tmp_path / "saved", base="x", standalone=True)
    assert not (tmp_path / "saved").exists()
    model.save_pretrained(tmp_path / "original")
    with pytest.raises(ec.CheckpointError, match="original holds another model already; choose another folder"):
        ec.save(student, tmp_path / "original", base="x", standalone=True)


def test_whoever_loads_the_original_of_a_converted_models_folder_is_told(pixart, tmp_path, caplog, monkeypatch):
    model, student, _ = pixart
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    student.save_pretrained(tmp_path)
    caplog.set_level(logging.WARNING, "diffusers")  # whatever another test has set
    caplog.clear()
    loaded = ec.load(tmp_path)
    assert "original attention" not in caplog.text
    assert "edit_compile" not in loaded.config
    type(model).from_pretrained(tmp_path)
    assert "diffusers reads the original, with its original attention; edit_compile.load reads the converted model" in caplog.text
