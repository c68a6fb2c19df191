"""Encoders of real pipelines (tiny, random weights) match what the pipelines pass to their transformers."""

from __future__ import annotations

import pytest
import torch

import edit_compile as ec
import pipelines
from edit_compile.adapters.encoders import make_decoder, make_encoder, stacked, trimmed
from edit_compile.adapters.sampling import make_sampler
from edit_compile.demo import models as demo

CPU = torch.device("cpu")
CAPTIONS = ["a red circle", "cat"]
UNBINNED = {"pixart": {"use_resolution_binning": False}}


@pytest.fixture(scope="module", params=pipelines.PIPELINES)
def named(request, tmp_path_factory):
    """A pipeline's name, the pipeline, and the folder it is saved in."""
    pipe, folder = pipelines.PIPELINES[request.param](), tmp_path_factory.mktemp(request.param)
    pipe.save_pretrained(folder)
    return request.param, pipe, str(folder)


@pytest.fixture(scope="module")
def encoder(named):
    _, pipe, folder = named
    return make_encoder(pipe.transformer, folder, CPU, torch.float32, 20)


def test_conditions_are_those_of_the_pipeline(named, encoder):
    name, pipe, _ = named
    options = {"height": 32, "width": 48, "guidance_scale": 1.0 if name != "flux" else 3.5, "max_sequence_length": 20}
    received = {}
    hook = pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: received.update(kwargs), with_kwargs=True)
    with hook:
        pipe(CAPTIONS, num_inference_steps=1, output_type="latent", **options, **UNBINNED.get(name, {}))
    found = encoder.encode_captions(CAPTIONS) | encoder.other_conditions((32, 48), 2)
    for key, value in found.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, received[key].to(value.dtype), rtol=1e-6, atol=1e-6)
        else:
            assert value == received[key]
    own = {"hidden_states", "timestep", "return_dict", "img_ids", "txt_ids", "joint_attention_kwargs", "skip_layers"}
    assert found.keys() >= {key for key, value in received.items() if value is not None} - own


def test_latents_are_in_the_models_scale(named, encoder):
    _, pipe, folder = named
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    latents = encoder.encode_images(images)
    assert latents.shape == (2, pipelines.LATENT_CHANNELS, 8, 12)
    vae = pipe.vae
    with torch.no_grad():
        expected = (vae.encode(images).latent_dist.mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
        decoded = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample
    torch.testing.assert_close(latents, expected)
    for decode in (encoder.decode, make_decoder(folder, CPU, torch.float32)):
        torch.testing.assert_close(decode(latents), (decoded / 2 + 0.5).clamp(0, 1))


def test_granularity_is_what_the_transformer_can_take(encoder):
    assert encoder.granularity == 8  # this VAE's 4 and patches of 2


def test_samples_are_the_pipelines(named):
    name, pipe, folder = named
    options = {"num_inference_steps": 2, "max_sequence_length": 20}
    latents = make_sampler(pipe.transformer, folder, CPU, torch.float32, options)(CAPTIONS, (32, 48), [5, 6])
    assert latents.shape == (2, pipelines.LATENT_CHANNELS, 8, 12)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    called = {"prompt": CAPTIONS, "height": 32, "width": 48, "generator": generators, "output_type": "pt"}
    expected = pipe(**called, **options, **UNBINNED.get(name, {})).images
    torch.testing.assert_close(make_decoder(folder, CPU, torch.float32)(latents), expected, rtol=1e-5, atol=1e-5)


def test_trimming_and_stacking_give_the_same_prediction():
    """PixArt masks the padding: without it, and padded to the batch's longest, the model says the same."""
    model = demo.untrained("dit").eval()
    conditions = demo.conditions(model, ["a red circle", "", "a picture with a white background showing a large blue cross"])
    tensors = {name: x for name, x in conditions.items() if isinstance(x, torch.Tensor)}
    rows = [trimmed({name: x[row] for name, x in tensors.items()}) for row in range(3)]
    assert [len(row["encoder_attention_mask"]) for row in rows] == [3, 32, 11]
    x, sigma = torch.randn(3, 3, 16, 16), torch.rand(3)
    with torch.no_grad():
        for chosen in ([0, 2], [0, 1, 2]):
            short = stacked([rows[row] for row in chosen]) | {"added_cond_kwargs": conditions["added_cond_kwargs"]}
            found = demo.predict(model, x[chosen], sigma[chosen], short)
            torch.testing.assert_close(found, demo.predict(model, x, sigma, conditions)[chosen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", demo.IMAGE_NAMES)
def test_demo_models_take_images_as_they_are(name):
    model = demo.untrained(name)
    encoder = make_encoder(model, f"demo/{name}", CPU, torch.float32, None)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    assert torch.equal(encoder.encode_images(images), images)
    conditions = encoder.encode_captions(["a red circle", ""]) | encoder.other_conditions((16, 24), 2)
    expected = demo.conditions(model, ["a red circle", ""])
    assert conditions.keys() == expected.keys()
    assert demo.predict(model, images, torch.rand(2), conditions).shape[2:] == (16, 24)
    with pytest.raises(ValueError, match=r"this demo model does not know \['zebra'\]"):
        encoder.check("a red zebra")


def test_a_model_without_its_pipeline_is_refused(tmp_path):
    model = demo.untrained("dit")
    with pytest.raises(ec.DistillError, match="need the model's pipeline, which is not known"):
        make_encoder(model, None, CPU, torch.float32, None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ec.DistillError, match="is a transformer without its pipeline"):
        make_encoder(model, str(tmp_path), CPU, torch.float32, None)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ec.DistillError, match=r"the VAE and text encoders of .* cannot be loaded"):
        make_encoder(model, str(tmp_path), CPU, torch.float32, None)
    with pytest.raises(ec.DistillError, match="how captions reach a Linear is not known"):
        make_encoder(torch.nn.Linear(1, 1), "demo/dit", CPU, torch.float32, None).other_conditions((8, 8), 1)
