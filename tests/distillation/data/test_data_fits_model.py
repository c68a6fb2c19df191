"""Data that a model cannot take are refused in one line, before its weights are loaded if its structure tells."""

from __future__ import annotations

import os

import datasets
import diffusers
import pytest
import torch
import yaml
from accelerate import Accelerator
from click.testing import CliRunner

import data_files
import edit_compile as ec
from edit_compile.adapters.denoise import denoise, misfit
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.cli import main
from edit_compile.demo import models
from edit_compile.demo.text import TEXT_CHANNELS
from edit_compile.distillation import Recipe
from edit_compile.distillation.context import Context
from edit_compile.distillation.data import BatchRequest, data_kinds
from edit_compile.distillation.data.registry import DATA
from edit_compile.distillation.make_cache import make_cache
from edit_compile.distillation.models import check_data, make_student

STAGES = [{"resolution": 32, "steps": 1, "global_batch_size": 2}]
DRAWN = ("shapes", "shape-groups", "moving-shapes")


def recipe(model, data=None):
    return Recipe.model_validate({"model": model, "stages": STAGES} | ({} if data is None else {"data": data}))


def structure(name):
    return ec.load_model(name, structure_only=True)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("sd3.5-medium", "SD3Transformer2DModel takes latents of 16 channels, not 3"),
        ("pixart-sigma", "PixArtTransformer2DModel takes latents of 4 channels, not 3"),
        ("flux-dev", "FluxTransformer2DModel takes latents of 16 channels, not 3"),
        ("hunyuan-video", "how captions reach a HunyuanVideoTransformer3DModel is not known"),
    ],
)
def test_what_is_drawn_for_demo_models_fits_no_latent_model(name, problem):
    found = structure(f"arch/{name}")
    for kind in DRAWN:
        with pytest.raises(ec.DistillError, match=problem):
            check_data(recipe(f"arch/{name}", {"kind": kind}), found)
    with pytest.raises(ec.DistillError, match=problem):  # the default
        check_data(recipe(f"arch/{name}"), found)


def test_each_demo_model_is_given_its_own_kind():
    own = (
        dict.fromkeys(models.IMAGE_NAMES, "shapes")
        | dict.fromkeys(models.LARGE_NAMES, "shape-groups")
        | {models.VIDEO_NAME: "moving-shapes"}
    )
    for name, kind in own.items():
        found = structure(f"demo/{name}")
        check_data(recipe(f"demo/{name}", {"kind": kind}), found)
        for other in set(DRAWN) - {kind}:
            with pytest.raises(ec.DistillError, match=rf"data\.kind: {other} is not what this \w+ was trained on; use {kind}"):
                check_data(recipe(f"demo/{name}", {"kind": other}), found)


def test_other_ranks_and_text_do_not_fit():
    image, video = structure("demo/dit").model, structure("demo/video-dit").model
    assert misfit(image, torch.empty(1, 3, 8, 8, 8), {}) == "PixArtTransformer2DModel takes images, not videos"
    assert misfit(video, torch.empty(1, 3, 8, 8), {}) == "WanTransformer3DModel takes videos, not images"
    wide, own = ({"encoder_hidden_states": torch.empty(1, 5, channels)} for channels in (4096, TEXT_CHANNELS))
    problem = f"PixArtTransformer2DModel takes encoder_hidden_states of {TEXT_CHANNELS} channels, not 4096"
    assert misfit(image, torch.empty(1, 3, 8, 8), wide) == problem
    assert misfit(image, torch.empty(1, 3, 8, 8), own) is None
    assert misfit(torch.nn.Linear(1, 1), torch.empty(1, 3), {}) is None


def test_images_are_not_for_models_whose_captions_or_pipeline_are_unknown(tmp_path):
    with torch.device("meta"):
        diffusers.CogView4Transformer2DModel(num_layers=1, num_attention_heads=1).save_config(tmp_path)
    data_files.folder_of(tmp_path / "images", [(32, 32)])
    for kind in ("images", "dataset", "webdataset", "prompts", "shapes"):
        data = {"kind": kind} | ({} if kind == "shapes" else {"path": str(tmp_path / "images")})
        with pytest.raises(ec.DistillError, match="how captions reach a CogView4Transformer2DModel is not known"):
            make_student(recipe(str(tmp_path / "config.json"), data))
    structure("demo/mm-dit").model.save_config(tmp_path)
    with pytest.raises(ec.DistillError, match="is a transformer without its pipeline"):
        make_student(recipe(str(tmp_path), {"kind": "images", "path": str(tmp_path / "images")}))


@pytest.mark.parametrize("kind", [kind for kind in data_kinds() if "path" in DATA.get(kind).model_fields and kind != "dataset"])
def test_files_that_are_not_there_are_named_before_weights_are_loaded(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("edit_compile.distillation.models.linearize", None)
    data = {"kind": kind, "path": str(tmp_path / "none")}
    found, where = recipe("demo/dit", data), str(tmp_path / "none")
    with pytest.raises(ec.DistillError, match=where):
        found.data.check_files(structure("demo/dit").model)
    if kind != "pipeline":  # which no demo model has
        with pytest.raises(ec.DistillError, match=where):
            make_student(found)


@pytest.mark.parametrize("kind", ["images", "webdataset", "dataset"])
def test_images_without_captions_are_named_before_weights_are_loaded(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("edit_compile.distillation.models.linearize", None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = data_files.folder_of(tmp_path / "images", [(32, 32)] * 3, captions=False)
    data_files.tar_of(tmp_path / "a.tar", [(file.name, file.read_bytes()) for file in sorted(folder.iterdir())])
    where, reason = {
        "images": ({"path": str(folder)}, "no metadata names it, and there is no 000"),
        "webdataset": ({"path": str(tmp_path / "*.tar")}, "it has no json, but png"),
        "dataset": ({"path": "imagefolder", "data_dir": str(folder)}, "it has no caption or text or prompt, but image"),
    }[kind]
    with pytest.raises(ec.DistillError, match=rf"none of the 3 images of .* can be used: .*: {reason}"):
        make_student(recipe("demo/dit", {"kind": kind, **where}))


def test_prompts_from_a_pipe_are_refused(tmp_path):
    os.mkfifo(tmp_path / "prompts.txt")
    with pytest.raises(ec.DistillError, match=r"prompts\.txt cannot be read: it is not a regular file"):
        make_student(recipe("demo/dit", {"kind": "prompts", "path": str(tmp_path / "prompts.txt")}))


def test_a_cache_of_a_model_with_other_channels_is_refused(tmp_path):
    folder = data_files.folder_of(tmp_path / "images", [(32, 32)] * 4)
    for caption in folder.glob("*.txt"):
        caption.write_text("a red circle")
    make_cache(recipe("demo/mm-dit", {"kind": "images", "path": str(folder)}), tmp_path / "cache")
    cached = {"kind": "cached", "path": str(tmp_path / "cache")}
    check_data(recipe("demo/mm-dit", cached), structure("demo/mm-dit"))
    with pytest.raises(ec.DistillError, match="was made for another model: SD3Transformer2DModel takes latents of 16 channels, not 3"):
        check_data(recipe("arch/sd3.5-medium", cached), structure("arch/sd3.5-medium"))
    with pytest.raises(ec.DistillError, match="was made for a SD3Transformer2DModel"):
        check_data(recipe("demo/dit", cached), structure("demo/dit"))


def test_a_source_of_ones_own_is_held_to_the_model_too():
    class Wrong:
        skipped, concurrent = {}, False

        def batch(self, request):
            return ec.distillation.data.Batch(torch.zeros(2, 4, 32, 32), {})

    model = structure("demo/dit").model
    context = Context(recipe("demo/dit"), model, model, Wrong(), denoise, NoiseSchedule("rectified-flow"), Accelerator(cpu=True))
    with pytest.raises(ec.DistillError, match="takes latents of 3 channels, not 4"):
        context.noisy_batch(BatchRequest(0, 2, range(2), 32, 32))


def test_the_command_says_it_in_one_line(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"model": "arch/sd3.5-medium", "prediction": "rectified-flow", "stages": STAGES}))
    for options in ((), ("--dry-run",)):
        result = CliRunner().invoke(main, ["distill", str(file), "-o", str(tmp_path / "run"), *options])
        assert result.exit_code == 1
        assert "data.kind: shapes is made for the demo models" in result.stderr.splitlines()[-1]
