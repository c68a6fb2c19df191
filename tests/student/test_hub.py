"""Checkpoints from a hub on this machine: what is downloaded, what is cached, and what is said when it cannot be."""

import json
import re

import pytest
import torch
from huggingface_hub import constants
from torch import nn

import edit_compile as ec
import toy
from edit_compile.student.checkpoint import base_of
from edit_compile.student.checkpoint_format import HERE, INDEX
from edit_compile.student.hub import checkpoint_folder
from edit_compile.student.site import converted_sites
from local_hub import LocalHub, commit_of, only_hub


@pytest.fixture(scope="module")
def base():
    return toy.shaken(toy.Toy(joint=True).eval())


@pytest.fixture(scope="module")
def student(base):
    student = ec.linearize(base, example_inputs=toy.inputs(text=5))
    toy.shaken(nn.ModuleList(converted_sites(student).values()), seed=7)
    return student


@pytest.fixture
def saved(student, tmp_path):
    folder = tmp_path / "saved"
    ec.save(student, folder, base="someone/model")
    (folder / "losses.png").write_bytes(b"not part of the checkpoint")
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder


@pytest.fixture
def hub(saved, tmp_path):
    with only_hub(LocalHub({"me/student": {"main": saved}}), tmp_path / "cache") as made:
        yield made


def says_that_the_original_is_here(folder):
    index = folder / INDEX
    index.write_text(json.dumps(json.loads(index.read_text()) | {"base": HERE}))


def test_a_hub_id_is_loaded_and_cached(hub, base, student):
    loaded = ec.load("me/student", base)
    with torch.no_grad():
        assert torch.equal(*(model(**toy.inputs(2, 10, 14, 5, 3)) for model in (loaded, student)))
    (weights,) = hub.files_asked() - {INDEX}
    assert re.fullmatch(r"edit_compile-\w+\.safetensors", weights)
    hub.asked.clear()
    assert base_of("https://huggingface.co/me/student") == "someone/model"
    assert not hub.files_asked()


def test_without_the_hub_what_was_downloaded_is_found(hub, monkeypatch):
    found = checkpoint_folder("me/student")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert checkpoint_folder("me/student") == found
    with pytest.raises(ec.ModelNotFoundError, match="me/other is not a local path, is not cached, and the hub cannot be reached"):
        ec.load("me/other")


def test_a_revision_is_the_one_that_is_loaded(hub, student, saved, tmp_path):
    ec.save(student, tmp_path / "older", base="someone/older")
    hub.repositories["me/student"]["v1"] = tmp_path / "older"
    for revision, name in (("v1", "older"), (commit_of(tmp_path / "older"), "older"), (None, "model")):
        assert base_of(checkpoint_folder("me/student", revision)) == f"someone/{name}"
    with pytest.raises(ec.ModelNotFoundError, match="me/student@v9 has no such revision"):
        ec.load("me/student", revision="v9")
    with pytest.raises(ec.ConfigError, match=r"saved has no revision .v1.: only what is on the hub has revisions"):
        ec.load(saved, revision="v1")


def test_a_folder_of_that_name_comes_first(hub, saved, monkeypatch, tmp_path):
    (tmp_path / "me").mkdir()
    saved.rename(tmp_path / "me" / "student")
    monkeypatch.chdir(tmp_path)
    assert base_of("me/student") == "someone/model"
    assert not hub.asked


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("me/nothing", ec.ModelNotFoundError, "there is no folder me/nothing here, and the hub has no me/nothing, or it is private: check"),
        ("me/gated", ec.ModelNotFoundError, "me/gated is gated: accept its licence"),
        ("me/model", ec.CheckpointError, r"me/model on the hub holds no checkpoint: edit_compile\.json is missing"),
        ("me/empty", ec.CheckpointError, r"me/empty on the hub holds no checkpoint: edit_compile\.json is missing"),
    ],
)
def test_what_the_hub_does_not_give_is_said_in_one_line(hub, saved, tmp_path, name, error, said):
    for folder in ("model", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    hub.repositories |= {"me/gated": {"main": saved}, "me/model": {"main": tmp_path / "model"}, "me/empty": {"main": tmp_path / "empty"}}
    hub.gated.add("me/gated")
    with pytest.raises(error, match=said) as caught:
        ec.load(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [ec.load, ec.load_pipeline])
def test_a_base_that_the_repository_names_is_not_downloaded(hub, saved, load):
    hub.repositories["someone/model"] = {"main": saved}
    with pytest.raises(ec.CheckpointError, match=r"was not downloaded before, .*: pass base='someone/model'"):
        load("me/student")
    assert not any("someone" in path for path in hub.asked)


def test_of_a_repository_that_holds_its_original_as_much_is_downloaded_as_is_needed(hub, saved, tmp_path):
    pipeline = tmp_path / "pipeline"
    (pipeline / "vae").mkdir(parents=True)
    says_that_the_original_is_here(saved)
    saved.rename(pipeline / "transformer")
    files = ("model_index.json", "vae/diffusion_pytorch_model.safetensors", "vae/pickled.bin", "transformer/config.json")
    for name in files:
        (pipeline / name).write_text("{}")
    hub.repositories["me/student"]["main"] = pipeline
    wanted = {"none": files[:1], "model": (files[0], files[3]), "pipeline": (*files[:2], files[3])}
    for originals, names in wanted.items():
        folder = checkpoint_folder("me/student", originals=originals)
        assert folder.name == "transformer"
        there = {str(file.relative_to(folder.parent)) for file in folder.parent.rglob("*") if file.is_file()}
        assert {name for name in there if "edit_compile" not in name} == set(names)
    assert base_of("me/student") == str(folder)
