"""Names to models, and what is said when a name leads nowhere."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file
from torch import nn

import edit_compile as ec
from edit_compile.adapters import hub_access, module_limit
from edit_compile.adapters.inputs import example_inputs
from edit_compile.adapters.load_model import load_model
from edit_compile.adapters.model_names import architectures
from edit_compile.adapters.pipelines import origin_of


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
    with pytest.raises(ec.ModelNotFoundError, match=r"config\.json is not a model's config: it is not valid JSON"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ec.ModelNotFoundError, match=r"config\.json is not a model's config: it holds a list"):
        load_model(str(tmp_path / "config.json"))


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
        (lambda: errors.CacheNotFound("no cache\nmore", "there"), "cannot be downloaded: no cache; give the path of a local copy$"),
        (lambda: type("ReadTimeout", (Exception,), {"__module__": "httpx"})("timed out"), "cannot be downloaded: timed out"),
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


def test_the_hubs_client_is_offline_until_the_last_of_several_threads_is_done(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    first, second = hub_access.only_cached(), hub_access.only_cached()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert constants.HF_HUB_OFFLINE
    second.__exit__(None, None, None)
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


@pytest.fixture
def folder(tmp_path):
    small = {"sample_size": 8, "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "cross_attention_dim": 8}
    PixArtTransformer2DModel(**small, norm_num_groups=4, caption_channels=8, use_additional_conditions=False).save_pretrained(tmp_path)
    return tmp_path


def weights_of(folder):
    return folder / "diffusion_pytorch_model.safetensors"


def refusal(folder):
    with pytest.raises(ec.ModelNotFoundError) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(str(folder))


def test_the_only_variant_is_loaded(folder):
    plain = load_model(str(folder)).model
    weights_of(folder).unlink()
    plain.half().save_pretrained(folder, variant="fp16")
    loaded = load_model(str(folder)).model
    assert loaded.dtype is torch.float32
    assert all(torch.equal(p.half(), q) for p, q in zip(loaded.parameters(), plain.parameters(), strict=True))
    next(folder.glob("*.fp16.*")).unlink()
    plain.save_pretrained(folder, variant="bf16", max_shard_size="4KB")
    assert len(list(folder.glob("*.bf16-*.safetensors"))) > 1
    assert load_model(str(folder)).model.dtype is torch.float32


def test_no_weights_are_named(folder):
    weights_of(folder).unlink()
    assert refusal(folder) == " has no weights (diffusion_pytorch_model.safetensors); its config.json alone gives the structure"


def test_weights_that_are_truncated_or_a_pointer_are_named(folder):
    content = weights_of(folder).read_bytes()
    weights_of(folder).write_bytes(content[: len(content) // 2])
    assert "the weights cannot be read: Unable to load weights from checkpoint file" in refusal(folder)
    weights_of(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")
    assert "git-lfs" in refusal(folder)


def test_weights_in_whole_numbers_are_refused(folder):
    tensors = load_file(weights_of(folder))
    name = "transformer_blocks.0.attn1.to_k.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, weights_of(folder), {"format": "pt"})
    assert f"{name} is stored in whole numbers (I8): it is quantized" in refusal(folder)


@pytest.mark.parametrize("name", ["", "config.json"])
def test_more_blocks_than_anybody_can_make_are_refused(folder, name, monkeypatch):
    monkeypatch.setattr(module_limit, "MOST_MODULES", 500)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 10**9}))
    told = "no PixArtTransformer2DModel can be made of it: it has more than 500 modules; the largest number of its config is"
    assert f"{told} 1000000000, of ['num_layers']" in refusal(folder / name)


def test_weights_in_a_pipe_are_refused(folder):
    weights_of(folder).unlink()
    os.mkfifo(weights_of(folder))
    assert refusal(folder) == "/diffusion_pytorch_model.safetensors is not a regular file, or a link to nowhere"


def test_weights_that_lack_a_parameter_or_have_another_shape_are_refused(folder):
    tensors = load_file(weights_of(folder))
    name = "transformer_blocks.0.attn1.to_k.weight"
    save_file({**tensors, name: tensors[name][:, :1].clone()}, weights_of(folder), {"format": "pt"})
    assert f"{name} expected shape" in refusal(folder)
    del tensors[name]
    save_file(tensors, weights_of(folder), {"format": "pt"})
    assert f"1 parameters of PixArtTransformer2DModel are in no file of weights, the first of them {name}" in refusal(folder)


def test_a_shard_that_is_missing_is_named(folder):
    model = load_model(str(folder)).model
    weights_of(folder).unlink()
    model.save_pretrained(folder, max_shard_size="4KB")
    gone = sorted(folder.glob("*-of-*.safetensors"))[1]
    gone.unlink()
    assert gone.name in refusal(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, "has no model class 'DDIMScheduler'"),
        ({"_class_name": ["Flux"]}, "has no model class ['Flux']"),
        ({"_class_name": "FluxTransformer2DModel", "num_layers": "many"}, "no FluxTransformer2DModel can be made of it: "),
        ({"_class_name": "FluxTransformer2DModel", "num_attention_heads": -1}, "no FluxTransformer2DModel can be made of it: "),
    ],
)
def test_a_config_that_makes_no_model_is_named(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ec.ModelNotFoundError) as caught:
        load_model(str(tmp_path / "config.json"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"num_attention_heads": -3}, {"in_channels": "four"}, {"_class_name": "ModelMixin"}])
def test_a_config_beside_weights_is_named_where_it_is_at_fault(folder, change):
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    assert refusal(folder).startswith(f"/config.json: no {config['_class_name']} can be made of it: ")


def test_an_index_of_shards_that_holds_something_else_is_refused(folder):
    weights_of(folder).unlink()
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text("[]")
    assert refusal(folder).startswith(": the weights cannot be read: ")


@pytest.mark.parametrize("name", ["a" * 300, f"{'a' * 300}/b", "a\0b"])
def test_a_name_that_no_file_can_have_is_refused(name):
    with pytest.raises(ec.ModelNotFoundError, match=r"neither|does not exist|not a local path"):
        load_model(name)


def test_a_pipelines_index_is_the_pipeline_and_a_file_of_weights_no_folder(folder):
    (folder / "transformer").mkdir()
    (folder / "config.json").rename(folder / "transformer" / "config.json")
    weights_of(folder).rename(weights_of(folder / "transformer"))
    (folder / "model_index.json").write_text("{}")
    assert load_model(str(folder / "model_index.json")).pipeline == str(folder)
    with pytest.raises(ec.ModelNotFoundError, match="is a single file of weights: load it with diffusers' from_single_file"):
        load_model(str(weights_of(folder / "transformer")))


@pytest.mark.parametrize(
    ("pipeline", "denoiser", "expected"),
    [
        ("{0}/pipe", "{0}/pipe/transformer", "{0}/pipe"),
        ("{0}/pipe", "{0}/tuned", "{0}/tuned"),
        ("{0}/pipe", None, "{0}/pipe"),
        (None, "{0}/tuned", "{0}/tuned"),
        ("org/pipe", "org/pipe", "org/pipe"),
        ("org/pipe", "/cache/models--org--pipe/snapshots/1/transformer", "org/pipe"),
        ("org/pipe", "org/tuned", "org/tuned"),
        (None, None, None),
    ],
)
def test_a_pipeline_with_another_denoiser_than_its_own_comes_from_where_that_does(tmp_path, pipeline, denoiser, expected):
    (tmp_path / "pipe" / "transformer").mkdir(parents=True)
    made = SimpleNamespace(config={"_name_or_path": pipeline and pipeline.format(tmp_path)}, transformer=nn.Linear(1, 1))
    made.transformer.config = {"_name_or_path": denoiser and denoiser.format(tmp_path)}
    assert origin_of(made) == (expected and expected.format(tmp_path))
