"""FLUX.2, Qwen-Image, Z-Image and HunyuanImage: one call of the model, captions that are padded, and the latents of their VAEs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import Flux2Pipeline
from torch import Tensor, nn

from edit_compile.adapters import flux2, hunyuan_image, latents, qwen_image, z_image
from edit_compile.adapters.denoise import denoise, random_batch
from edit_compile.adapters.family import Family, lookup_family
from edit_compile.adapters.inputs import pixels_per_token

ROWS, COLUMNS = 4, 6
TEXT, PADDING = 5, 3
TEXT_CHANNELS = 24


def tiny_flux2() -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_CHANNELS,
        axes_dims_rope=(4, 4, 4, 4),
    )


def tiny_qwen_image() -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_CHANNELS,
        axes_dims_rope=(4, 6, 6),
    )


def tiny_z_image() -> nn.Module:
    return diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=TEXT_CHANNELS,
        axes_dims=[4, 6, 6],
    )


def tiny_hunyuan_image() -> nn.Module:
    return diffusers.HunyuanImageTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=TEXT_CHANNELS,
        rope_axes_dim=(8, 8),
    )


FAMILIES: dict[Callable[[], nn.Module], type[Family]] = {
    tiny_flux2: flux2.Flux2,
    tiny_qwen_image: qwen_image.QwenImage,
    tiny_z_image: z_image.ZImage,
    tiny_hunyuan_image: hunyuan_image.HunyuanImage,
}


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model in which every weight matters, those that start at zero or one included."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def batch_of(model: nn.Module, device: str = "cpu") -> tuple[Tensor, dict[str, Any]]:
    pixels = pixels_per_token(model)
    return random_batch(model, ROWS * pixels, COLUMNS * pixels, 2, device=device)


@pytest.mark.parametrize("build", FAMILIES)
def test_a_family_is_found_and_its_prediction_has_the_latents_shape(build):
    model = seeded(build)
    assert isinstance(lookup_family(model), FAMILIES[build])
    x, conditions = batch_of(model)
    with torch.no_grad():
        predicted = denoise(model, x, torch.tensor([10.0, 990.0]), conditions)
    assert predicted.shape == x.shape
    assert predicted.isfinite().all()
    on_meta = model.to("meta")
    empty, conditions = batch_of(on_meta, "meta")
    assert empty.shape == x.shape
    assert denoise(on_meta, empty, torch.empty(2, device="meta"), conditions).shape == x.shape


@pytest.mark.parametrize("build", [build for build in FAMILIES if build is not tiny_flux2])  # FLUX.2 takes no mask: its padding is read
def test_padding_that_a_caption_masks_changes_nothing(build):
    model = seeded(build)
    x, _ = batch_of(model)
    captions, times = torch.randn(2, TEXT + PADDING, TEXT_CHANNELS), torch.tensor([300.0, 700.0])
    mask = torch.ones(2, TEXT + PADDING)
    mask[:, TEXT:] = 0

    def predict(count: int, mask: Tensor) -> Tensor:
        conditions = {"encoder_hidden_states": captions[:, :count], "encoder_attention_mask": mask[:, :count]}
        with torch.no_grad():
            return denoise(model, x, times, conditions)

    alone = predict(TEXT, mask)
    torch.testing.assert_close(predict(TEXT + PADDING, mask), alone, atol=1e-5, rtol=0)
    assert (predict(TEXT + PADDING, torch.ones_like(mask)) - alone).abs().max() > 1e-3


def tiny_vae_of_shift_and_factor() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        scaling_factor=0.36,
        shift_factor=0.12,
    )


def tiny_vae_of_channel_statistics() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, -0.4],
        latents_std=[0.5, 1.0, 2.0, 4.0],
    )


def tiny_vae_of_patch_statistics() -> Any:
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def shifted(vae: Any, x: Tensor) -> Tensor:
    """Scale latents as FluxImg2ImgPipeline does."""
    return (x - vae.config.shift_factor) * vae.config.scaling_factor


def standardized(vae: Any, x: Tensor) -> Tensor:
    """Scale latents as QwenImageImg2ImgPipeline does."""
    mean, deviation = (torch.tensor(each).view(1, -1, 1, 1) for each in (vae.config.latents_mean, vae.config.latents_std))
    return (x - mean) * (1.0 / deviation)


def normed(vae: Any, x: Tensor) -> Tensor:
    """Scale latents as Flux2Pipeline does."""
    deviation = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    return (Flux2Pipeline._patchify_latents(x) - vae.bn.running_mean.view(1, -1, 1, 1)) / deviation


def restored(vae: Any, x: Tensor) -> Tensor:
    """Undo the scale as Flux2Pipeline does before it decodes."""
    deviation = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    return Flux2Pipeline._unpatchify_latents(x * deviation + vae.bn.running_mean.view(1, -1, 1, 1))


VAES: dict[Callable[[], Any], Callable[[Any, Tensor], Tensor]] = {
    tiny_vae_of_shift_and_factor: shifted,
    tiny_vae_of_channel_statistics: standardized,
    tiny_vae_of_patch_statistics: normed,
}


@pytest.mark.parametrize("build", VAES)
def test_images_are_encoded_and_decoded_as_the_pipelines_do(build):
    vae, images = seeded(build), torch.rand(2, 3, 8, 12) * 2 - 1
    videos = latents.takes_videos(vae)
    assert videos == (build is tiny_vae_of_channel_statistics)
    with torch.no_grad():
        modes = vae.encode(images[:, :, None] if videos else images).latent_dist.mode()
        encoded = latents.encode(vae, images)
        torch.testing.assert_close(encoded, VAES[build](vae, modes[:, :, 0] if videos else modes))
        decoded = vae.decode(modes, return_dict=False)[0]
        torch.testing.assert_close(latents.decode(vae, encoded), decoded[:, :, 0] if videos else decoded, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("build", VAES)
def test_scaling_latents_is_undone_by_its_inverse(build):
    vae, x = seeded(build), torch.randn(2, 4, 4, 6)
    scaled = latents.normalized(vae, x)
    assert scaled.shape == ((2, 16, 2, 3) if build is tiny_vae_of_patch_statistics else x.shape)
    torch.testing.assert_close(latents.denormalized(vae, scaled), x, atol=1e-5, rtol=1e-5)


def test_patches_are_restored_as_by_flux2():
    vae, x = seeded(tiny_vae_of_patch_statistics), torch.randn(2, 16, 2, 3)
    torch.testing.assert_close(latents.denormalized(vae, x), restored(vae, x))
