"""Models of the hub on the command line: wherever the folder of a student or of a run is taken, a hub id is too, and a revision of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import edit_compile as ec
from edit_compile.adapters.model_names import hub_id, is_on_hub, with_revision, without_address
from edit_compile.cli import main
from edit_compile.distillation import distill, load_recipe
from local_hub import LocalHub, only_hub

PROMPT = "a picture with a black background showing a small red circle in the upper left part of the picture and nothing else"
SMALL = {
    "convert": {"include": ["*.0.*"]},
    "layerwise": None,
    "stages": [{"resolution": 32, "steps": 1, "global_batch_size": 1}],
    "validation": {"samples": 2, "timestep_bins": 1},
    "samples": {"count": 1, "steps": 1},
    "trackers": [],
    "standalone": True,
}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The folder of a finished run of a demo model."""
    return distill(load_recipe("demo-dit", list(SMALL.items())), tmp_path_factory.mktemp("runs") / "student").folder


@pytest.fixture
def hub(student, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with only_hub(LocalHub({"me/student": {"main": tmp_path / "empty", "v1": student}}), tmp_path / "cache") as made:
        (tmp_path / "empty").mkdir()
        yield made


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def said(result):
    assert result.exit_code == 1
    return result.stderr.splitlines()[-1]  # after the bars of the hub's client


def test_a_revision_is_sampled_from(hub, student):
    for name, words in (("there.png", ("me/student", "--revision", "v1")), ("here.png", (student,))):
        result = run("sample", *words, "--prompt", PROMPT, "--steps", 1, "-o", name)
        assert result.exit_code == 0, result.stderr
    assert np.array_equal(*(np.asarray(Image.open(name)) for name in ("there.png", "here.png")))
    newest = run("sample", "me/student", "--prompt", PROMPT, "-o", "newest.png")
    assert "me/student on the hub holds no checkpoint: edit_compile.json is missing" in said(newest)


def test_a_student_of_the_hub_is_distilled_further_and_not_ranked(hub):
    words = ["--set", "convert={}", "--set", "layerwise=null", "--dry-run", "--json"]
    result = run("distill", "demo-dit", "--model", "me/student", "--revision", "v1", *words)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["recipe"]["model"] == "me/student@v1"
    assert [site["path"] for site in found["plan"]["sites"] if site["action"] == "edit"] == ["transformer_blocks.0.attn1"]
    refused = said(run("distill", "demo-dit", "--model", "me/student@v1", "--set", "convert.reduction=2", "-o", "out"))
    assert "me/student@v1 is already converted: leave convert: out of the recipe" in refused
    assert "me/student@v1 is converted already: rank the model" in said(run("rank", "me/student@v1", "--recipe", "demo-dit"))


def test_a_run_of_the_hub_is_compared_and_reported(hub, student):
    assert "me/student@v1 is on the hub: say where the page is written, with -o" in said(run("report", "me/student@v1"))
    assert run("report", "me/student@v1", "-o", "page.html").exit_code == 0
    assert run("report", student, "-o", "same.html").exit_code == 0
    assert Path("page.html").read_text() == Path("same.html").read_text()
    result = run("compare", "me/student@v1", "-o", "compared", "--samples", 0, "--json")
    assert result.exit_code == 0, result.stderr
    (_, row) = json.loads(result.stdout)["rows"]
    assert row["numbers"]["error.after"]["median"] == pytest.approx(
        json.loads((student / "result.json").read_text())["held_out_error"]["after"]["total"]
    )


def test_an_evaluation_of_what_is_on_the_hub_needs_a_place(hub, tmp_path):
    (tmp_path / "prompts.txt").write_text(PROMPT)
    result = run("evaluate", "me/student", "--revision", "v1", "--prompts", "prompts.txt", "--metrics", "lpips")
    assert "me/student@v1 is on the hub: say where the result is written, with -o FILE.json" in said(result)


def test_a_run_leaves_a_student_that_stands_alone(student):
    assert json.loads((student / "config.json").read_text())["auto_map"]["AutoModel"].endswith(".LinearPixArtTransformer2DModel")
    assert 'AutoModel.from_pretrained("this folder", trust_remote_code=True)' in (student / "README.md").read_text()
    with pytest.raises(ec.RecipeError, match="standalone: a standalone model has no LoRA: set lora"):
        load_recipe("demo-dit", ["train=lora", "standalone=true"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("inspect", "demo/dit", "--revision", "v1"), "demo/dit has no revision 'v1': only what is on the hub has revisions"),
        (("sample", "here", "--revision", "v1", "--prompt", "x", "-o", "x.png"), "here has no revision 'v1': only what is on the hub"),
        (("bench", "me/student@v1", "--revision", "v2"), "me/student@v1 names a revision already, which is not 'v2'"),
        (("sample", "me/nothing", "--prompt", "x", "-o", "x.png"), "there is no folder me/nothing here, and the hub has no me/nothing"),
        (("inspect", "me/nothing@v1"), "there is no folder me/nothing@v1 here, and the hub has no me/nothing"),
    ],
)
def test_names_that_lead_nowhere(hub, tmp_path, words, message):
    (tmp_path / "here").mkdir()
    assert message in said(run(*words))


def test_a_revision_of_a_recipes_own_model_is_in_the_recipe(hub):
    result = run("distill", "demo-dit", "--revision", "v1")
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "--revision is of --model; in a recipe, write model: ORG/NAME@REVISION" in result.stderr


def test_names_and_addresses_with_revisions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for address in ("https://huggingface.co/me/model/tree/v1", "hf.co/me/model", "https://hf.co/me/model/blob/refs%2Fpr%2F3/config.json"):
        found = without_address(address)
        assert re.fullmatch(r"me/model(@(v1|refs/pr/3))?", found), found
    for other in ("https://huggingface.co/datasets/me/photos", "huggingface.co/spaces/me/demo", "hf.company/me/model"):
        assert without_address(other) == other
    assert hub_id("stabilityai/sd3.5-medium@v1") == ("stabilityai/stable-diffusion-3.5-medium", "v1")
    assert with_revision("https://hf.co/me/model", "refs/pr/3") == "me/model@refs/pr/3"
    assert is_on_hub("me/model@refs/pr/3")
    assert is_on_hub("timm/vit")
    (tmp_path / "timm" / "vit").mkdir(parents=True)
    assert not is_on_hub("timm/vit")
