"""Names to models, and what is said when a name leads nowhere."""

from __future__ import annotations

import json
import time

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

import edit_compile as ec
from edit_compile.adapters import hub_access
from edit_compile.adapters.inputs import example_inputs
from edit_compile.adapters.load_model import architectures, load_model


def test_demo_model_has_weights_and_can_be_had_without():
    loaded = load_model("demo/mm-dit")
    assert loaded.has_weights
    assert next(loaded.model.parameters()).device.type == "cpu"
    structure = load_model("demo/mm-dit", structure_only=True)
    assert not structure.has_weights
    assert structure.model.config.num_layers == loaded.model.config.num_layers


def test_architectures_are_full_size_and_on_meta():
    billions = {"pixart-sigma": 0.61, "sd3.5-medium": 2.24, "sd3.5-large": 8.06, "flux-dev": 11.9, "dit-xl-2": 0.750}
    billions |= {"flux2-dev": 32.2, "qwen-image": 20.4, "z-image": 6.15, "hunyuan-image": 17.4}
    billions |= {"wan2.1-t2v-14b": 14.3, "hunyuan-video": 12.8}
    assert set(billions) == set(architectures())
    for name, expected in billions.items():
        model = load_model(f"arch/{name}").model
        assert all(p.is_meta for p in model.parameters())
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(expected, rel=0.01)


def test_local_folder_and_config(tmp_path):
    model = load_model("demo/mm-dit").model
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype=torch.bfloat16)
    assert loaded.model.dtype is torch.bfloat16
    assert loaded.source == str(tmp_path)
    config = str(tmp_path / "config.json")
    assert not load_model(config).has_weights
    assert load_model(config, dtype=torch.bfloat16, random_weights=True).model.dtype is torch.bfloat16
    loaded.model.save_pretrained(tmp_path / "halves")
    assert load_model(str(tmp_path / "halves")).model.dtype is torch.float32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("demo/nothing", "no demo model 'nothing'; there are: mm-dit"),
        ("arch/nothing", "there are: dit-xl-2, flux-dev, flux2-dev"),
        ("timm/nothing", "has no model 'nothing'"),
        ("./nothing/here", "does not exist; give a folder"),
        ("no such/model", "no such/model is neither a local path nor a hub id"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ec.ModelNotFoundError, match=message):
        load_model(name)


def test_unknown_class_and_no_model(tmp_path):
    with pytest.raises(ec.ModelNotFoundError, match=r"has no config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "NoSuchModel"}))
    with pytest.raises(ec.ModelNotFoundError, match=rf"^{tmp_path}: diffusers .* has no model class 'NoSuchModel'$"):
        load_model(str(tmp_path))


def test_a_broken_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ec.ModelNotFoundError, match=r"config\.json is not valid JSON"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ec.ModelNotFoundError, match=r"config\.json is not a model's config: it holds a list"):
        load_model(str(tmp_path / "config.json"))


def test_a_folder_without_weights_is_named(tmp_path):
    load_model("demo/mm-dit", structure_only=True).model.save_config(tmp_path)
    with pytest.raises(ec.ModelNotFoundError, match="the weights cannot be read"):
        load_model(str(tmp_path))
    assert not load_model(str(tmp_path), structure_only=True).has_weights


def bare(kind):
    """A hub error without the response that its constructor asks for."""
    error = kind.__new__(kind)
    error.args = ("no",)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: bare(errors.GatedRepoError), "is gated: accept its licence .* `hf auth login`"),
        (lambda: bare(errors.RepositoryNotFoundError), "the hub has no stabilityai/stable-diffusion-3.5-medium"),
        (lambda: bare(errors.EntryNotFoundError), "has no transformer/config.json: it is not a pipeline"),
        (lambda: bare(errors.LocalEntryNotFoundError), "cannot be reached: .* local copy"),
        (lambda: OSError("disk full"), "cannot be downloaded: disk full"),
    ],
)
def test_hub_errors_say_what_to_do(monkeypatch, error, message):
    def fails(*_args, **_options):
        raise error()

    monkeypatch.setattr(hub_access, "hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(ec.ModelNotFoundError, match=message):
        load_model("stabilityai/sd3.5-medium")


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No hub, and an empty cache."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://localhost:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.mark.parametrize("name", ["stabilityai/sd3.5-medium", "timm/vit_tiny_patch16_224"])
def test_without_a_network_one_line_comes_at_once(no_network, caplog, capfd, name):
    began = time.monotonic()
    with pytest.raises(ec.ModelNotFoundError, match=r"is not cached, and the hub cannot be reached: check .* local copy") as caught:
        load_model(name)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 15  # the hub's client alone retries for 23 s; importing timm counts
    assert "Retrying" not in caplog.text + capfd.readouterr().err
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")  # diffusers passes it
def test_a_cached_copy_is_found_without_a_network(no_network, tmp_path):
    snapshot = tmp_path / "models--stabilityai--stable-diffusion-3.5-medium" / "snapshots" / ("0" * 40)
    folder = snapshot / "transformer"
    model = load_model("demo/mm-dit").model
    model.save_pretrained(folder)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    loaded = load_model("stabilityai/sd3.5-medium")
    assert loaded.source == loaded.pipeline == "stabilityai/stable-diffusion-3.5-medium"
    assert all(torch.equal(x, y) for x, y in zip(loaded.model.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["demo/mm-dit", "timm/vit_tiny_patch16_224"])
def test_example_inputs_run(name):
    model = load_model(name, structure_only=True).model.to(torch.bfloat16)
    with torch.no_grad():
        assert model(**example_inputs(model)) is not None
