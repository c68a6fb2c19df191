"""What the families say of their models, against diffusers' own pipelines; and that models find their family."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, SD3Transformer2DModel

import edit_compile as ec
import families
import pipelines
from edit_compile import adapters
from edit_compile.adapters import dit, flux, pixart, sd3, timm_vit
from edit_compile.adapters.denoise import denoise, random_batch
from edit_compile.adapters.family import DiffusionFamily, Family, TextToImageFamily, known_classes, lookup_family
from edit_compile.adapters.inputs import inputs_for_size
from edit_compile.adapters.load_model import load_model
from edit_compile.adapters.packing import pack, position_ids, unpack
from edit_compile.demo import models as demo

CPU = torch.device("cpu")


def test_every_class_finds_its_family_and_so_do_classes_derived_from_it():
    found = {
        name: type(lookup_family(load_model(name, structure_only=True).model)) for name in ("arch/flux-dev", "arch/dit-xl-2", "demo/dit")
    }
    assert found == {"arch/flux-dev": flux.Flux, "arch/dit-xl-2": dit.DiT, "demo/dit": pixart.PixArt}
    assert isinstance(lookup_family(load_model("timm/vit_tiny_patch16_224", structure_only=True).model), timm_vit.TimmViT)
    model = demo.untrained("mm-dit")
    model.__class__ = type("Derived", (type(model),), {})
    assert isinstance(lookup_family(model), sd3.SD3)
    assert lookup_family(torch.nn.Linear(1, 1)) is None


def test_known_classes_are_those_that_offer_the_part():
    generative = ("PixArt", "SD3", "Flux", "Flux2", "QwenImage", "ZImage", "HunyuanImage")
    assert known_classes(TextToImageFamily) == ", ".join([*(f"{name}Transformer2DModel" for name in generative), "WanTransformer3DModel"])
    assert known_classes(DiffusionFamily) == f"{known_classes(TextToImageFamily)}, HunyuanVideoTransformer3DModel, DiTTransformer2DModel"
    assert known_classes(Family) == f"{known_classes(DiffusionFamily)}, VisionTransformer"


def test_a_part_that_a_family_lacks_is_refused():
    vit = load_model("timm/vit_tiny_patch16_224", structure_only=True).model
    with pytest.raises(ec.NoExampleInputsError, match=r"how to call a VisionTransformer is not known \(known: PixArt"):
        random_batch(vit, 224, 224, 1)
    with pytest.raises(ec.NoExampleInputsError, match="no example inputs are known for Linear: give the pipeline that it is part of"):
        inputs_for_size(torch.nn.Linear(1, 1), 64, 64)


@pytest.mark.parametrize("name", ["sd3", "pixart", "flux", "dit"])
def test_denoise_gives_a_prediction_of_the_latents_shape(name):
    model = getattr(families, name)()[0]
    side = 8 * model.config.sample_size if name == "dit" else 128
    x, conditions = random_batch(model, side, side, 2)
    with torch.no_grad():
        assert denoise(model, x, torch.tensor([10.0, 990.0]).to(x), conditions).shape == x.shape


def test_flux_packs_and_numbers_as_its_pipeline():
    x = torch.randn(2, 4, 6, 10)
    tokens = pack(x, flux.FAMILY.packed)
    assert torch.equal(tokens, FluxPipeline._pack_latents(x, 2, 4, 6, 10))
    assert torch.equal(unpack(tokens, (3, 5), flux.FAMILY.packed), x)
    assert torch.equal(position_ids(3, 5, 1, 0), FluxPipeline._prepare_latent_image_ids(2, 3, 5, CPU, torch.float32))


def test_flux_is_called_as_its_pipeline_calls_it():
    """The prediction for the pipeline's own first step, from unpacked latents, is that of the recorded call."""
    pipe = pipelines.flux_pipeline()
    recorded = ec.record(pipe, prompt="a cat", height=32, width=48, max_sequence_length=20)
    with torch.no_grad():
        expected = unpack(pipe.transformer(**recorded)[0], (4, 6), flux.FAMILY.packed)
        x = unpack(recorded["hidden_states"], (4, 6), flux.FAMILY.packed)
        conditions = {name: recorded[name] for name in ("encoder_hidden_states", "pooled_projections", "guidance")}
        torch.testing.assert_close(denoise(pipe.transformer, x, 1000 * recorded["timestep"], conditions), expected)


def test_neither_diffusers_nor_timm_is_imported_with_the_adapters():
    modules = sorted(path.stem for path in Path(adapters.__file__).parent.glob("*.py"))
    assert len(modules) > 15
    imports = "; ".join(f"import edit_compile.adapters.{name}" for name in modules)
    code = f"import sys; {imports}; print([name for name in ('diffusers', 'timm', 'huggingface_hub') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("table", [24, None])
def test_positions_end_where_their_table_does_and_nowhere_without_one(table):
    model = SD3Transformer2DModel(
        sample_size=12, num_layers=1, num_attention_heads=1, joint_attention_dim=8, caption_projection_dim=64, pos_embed_max_size=table
    )
    assert inputs_for_size(model, 128, 96, device="meta").grid == (8, 6)
    if table is None:
        assert inputs_for_size(model, 1024, 768, device="meta").grid == (64, 48)
    else:
        with pytest.raises(ec.GridError, match="pos_embed_max_size=24"):
            inputs_for_size(model, 1024, 768, device="meta")
