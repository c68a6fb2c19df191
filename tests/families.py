"""Tiny random models of every supported family, each with example inputs.

The sizes are mutually different on purpose, so that a compiler that mixes up two axes fails: batch 2, 3 heads of 16 channels, a 5x7 grid
(35 image tokens), 11 text tokens. Parameters that a class initialises to a constant are made random, so that no path is dead.
"""

import warnings
from collections.abc import Callable
from typing import Any

import timm.models.vision_transformer as timm_vit
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    BriaTransformer2DModel,
    ChromaTransformer2DModel,
    CogView4Transformer2DModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    LTXVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from torch import nn

Family = tuple[nn.Module, dict[str, Any]]

BATCH, ROWS, COLUMNS, FRAMES = 2, 5, 7, 4
TOKENS = ROWS * COLUMNS
TEXT, TEXT_DIM, POOLED_DIM = 11, 24, 28
HEADS, HEAD_DIM = 3, 16
WIDTH = HEADS * HEAD_DIM
CHANNELS, PACKED_CHANNELS, VIDEO_CHANNELS = 4, 12, 8
SIZES: dict[str, Any] = {"attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS}
LATENTS: dict[str, Any] = {"sample_size": 16, "patch_size": 2, "in_channels": CHANNELS}


def build(make: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """A seeded model in eval mode, its constant parameters (zero gates, unit norms, empty tokens) made random."""
    torch.manual_seed(0)
    with warnings.catch_warnings():  # Chroma still builds a deprecated class of its own library
        warnings.simplefilter("ignore", FutureWarning)
        model = make(**options).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if not parameter.isfinite().all():
                parameter.copy_(noise)
            elif (parameter == parameter.flatten()[0]).all():
                parameter.add_(noise, alpha=0.1)
    return model


def normal(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents(channels: int = CHANNELS, patch: int = 2) -> torch.Tensor:
    return normal(BATCH, channels, ROWS * patch, COLUMNS * patch)


def text(length: int = TEXT, channels: int = TEXT_DIM) -> torch.Tensor:
    return normal(BATCH, length, channels, seed=3)


def text_mask(length: int = TEXT) -> torch.Tensor:
    """As a tokenizer gives it: the second prompt is shorter and padded on the right."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1, length // 2 + 1 :] = 0
    return mask


def steps(scale: float = 1000.0) -> torch.Tensor:
    return torch.tensor([0.25, 0.75]) * scale


def grid_ids() -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(ROWS), torch.arange(COLUMNS), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(TOKENS, 3).float()


def packed_inputs() -> dict[str, Any]:
    return {
        "hidden_states": normal(BATCH, TOKENS, PACKED_CHANNELS),
        "encoder_hidden_states": text(),
        "timestep": steps(1.0),
        "img_ids": grid_ids(),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }


def sd3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": latents(),
        "encoder_hidden_states": text(),
        "pooled_projections": normal(BATCH, POOLED_DIM, seed=4),
        "timestep": steps(),
        "return_dict": False,
    }


def sd3(**options: Any) -> Family:
    text_options = {"joint_attention_dim": TEXT_DIM, "caption_projection_dim": WIDTH, "pooled_projection_dim": POOLED_DIM}
    shape = {"num_layers": 3, "out_channels": CHANNELS, "pos_embed_max_size": 20}
    return build(SD3Transformer2DModel, **SIZES, **LATENTS, **text_options, **shape, **options), sd3_inputs()


def sd3_dual() -> Family:
    return sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm")


def pixart() -> Family:
    options = {"num_layers": 2, "out_channels": 2 * CHANNELS, "cross_attention_dim": WIDTH, "caption_channels": TEXT_DIM}
    model = build(PixArtTransformer2DModel, **SIZES, **LATENTS, **options, use_additional_conditions=False, norm_num_groups=4)
    return model, {
        "hidden_states": latents(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": text_mask(),
        "timestep": steps(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def flux() -> Family:
    options = {"in_channels": PACKED_CHANNELS, "num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (4, 6, 6)}
    text_options = {"joint_attention_dim": TEXT_DIM, "pooled_projection_dim": POOLED_DIM, "guidance_embeds": True}
    model = build(FluxTransformer2DModel, **SIZES, **options, **text_options)
    pooled = normal(BATCH, POOLED_DIM, seed=4)
    return model, {**packed_inputs(), "pooled_projections": pooled, "guidance": torch.full((BATCH,), 3.5)}


def bria() -> Family:
    options = {"in_channels": PACKED_CHANNELS, "num_layers": 2, "num_single_layers": 2, "axes_dims_rope": [4, 6, 6]}
    return build(BriaTransformer2DModel, **SIZES, **options, joint_attention_dim=TEXT_DIM), packed_inputs()


def chroma() -> Family:
    """The mask covers text and image and is 0 or 1 in the dtype of the model, as its pipeline makes it: diffusers adds it to the scores."""
    options = {"in_channels": PACKED_CHANNELS, "num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (4, 6, 6)}
    approximator = {"approximator_num_channels": 32, "approximator_hidden_dim": 40, "approximator_layers": 2}
    model = build(ChromaTransformer2DModel, **SIZES, **options, **approximator, joint_attention_dim=TEXT_DIM)
    mask = torch.cat([text_mask().float(), torch.ones(BATCH, TOKENS)], dim=1)
    return model, {**packed_inputs(), "attention_mask": mask}


def dit() -> Family:
    """A square grid: the class computes the side of the image as the square root of the token count."""
    side = 6
    options = {**SIZES, **LATENTS, "sample_size": 2 * side, "num_layers": 2, "out_channels": 2 * CHANNELS}
    model = build(DiTTransformer2DModel, **options, num_embeds_ada_norm=10, norm_num_groups=4)
    return model, {
        "hidden_states": normal(BATCH, CHANNELS, 2 * side, 2 * side),
        "timestep": steps(),
        "class_labels": torch.tensor([1, 9]),
        "return_dict": False,
    }


def vit(**options: Any) -> Family:
    patch, heads = 16, 6
    sizes = {"img_size": (ROWS * patch, COLUMNS * patch), "patch_size": patch, "embed_dim": heads * HEAD_DIM}
    model = build(timm_vit.VisionTransformer, **sizes, depth=2, num_heads=heads, num_classes=10, **options)
    return model, {"x": latents(3, patch)}


def vit_registers() -> Family:
    return vit(reg_tokens=4, no_embed_class=True, init_values=1e-5)


def cogview4() -> Family:
    """No mask, as in its pipeline: the class takes one, but adds its zeros and ones to the scores."""
    options = {"patch_size": 2, "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 2}
    model = build(CogView4Transformer2DModel, **SIZES, **options, text_embed_dim=TEXT_DIM, time_embed_dim=40, condition_dim=6)
    size = torch.tensor([[80.0, 112.0]]).repeat(BATCH, 1)
    return model, {
        "hidden_states": latents(),
        "encoder_hidden_states": text(),
        "timestep": steps(),
        "original_size": size,
        "target_size": size.clone(),
        "crop_coords": torch.zeros(BATCH, 2),
        "return_dict": False,
    }


def hunyuan_dit() -> Family:
    """Four layers, so that one long skip connection exists; padding replaces text tokens and no attention mask is used."""
    t5_length, t5_dim = 9, 40
    text_options = {"text_len": TEXT, "cross_attention_dim": TEXT_DIM, "text_len_t5": t5_length, "cross_attention_dim_t5": t5_dim}
    options = {"hidden_size": WIDTH, "num_layers": 4, "pooled_projection_dim": POOLED_DIM}
    model = build(HunyuanDiT2DModel, **SIZES, **LATENTS, **options, **text_options)
    return model, {
        "hidden_states": latents(),
        "timestep": steps(),
        "encoder_hidden_states": text(),
        "text_embedding_mask": text_mask(),
        "encoder_hidden_states_t5": text(t5_length, t5_dim),
        "text_embedding_mask_t5": text_mask(t5_length),
        "image_meta_size": torch.tensor([[80.0, 112.0, 80.0, 112.0, 0.0, 0.0]]).repeat(BATCH, 1),
        "style": torch.zeros(BATCH, dtype=torch.long),
        "image_rotary_emb": get_2d_rotary_pos_embed(HEAD_DIM, ((0, 0), (ROWS, COLUMNS)), (ROWS, COLUMNS)),
        "return_dict": False,
    }


def aura_flow() -> Family:
    options = {"num_mmdit_layers": 2, "num_single_dit_layers": 2, "out_channels": CHANNELS, "pos_embed_max_size": 256}
    text_options = {"joint_attention_dim": TEXT_DIM, "caption_projection_dim": WIDTH}
    model = build(AuraFlowTransformer2DModel, **SIZES, **LATENTS, **options, **text_options)
    return model, {"hidden_states": latents(), "encoder_hidden_states": text(), "timestep": steps(1.0), "return_dict": False}


def grouped_heads() -> dict[str, Any]:
    return {"hidden_size": 6 * HEAD_DIM, "num_attention_heads": 6, "num_kv_heads": 3, "multiple_of": 32, "num_layers": 2}


def lumina_next() -> Family:
    """Grouped heads, and a complex table of rotations larger than the grid, which the model slices, as its pipeline makes it."""
    model = build(LuminaNextDiT2DModel, **LATENTS, **grouped_heads(), cross_attention_dim=TEXT_DIM)
    return model, {
        "hidden_states": latents(),
        "timestep": steps(1.0),
        "encoder_hidden_states": text(),
        "encoder_mask": text_mask(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(HEAD_DIM, 20, 22),
        "cross_attention_kwargs": {},
        "return_dict": False,
    }


def sana() -> Family:
    """Self-attention is linear already; only the cross-attention has a softmax."""
    cross = {"num_cross_attention_heads": HEADS, "cross_attention_head_dim": HEAD_DIM, "cross_attention_dim": WIDTH}
    options = {"in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 2, "sample_size": 16, "patch_size": 1}
    model = build(SanaTransformer2DModel, **SIZES, **options, **cross, caption_channels=TEXT_DIM)
    return model, {
        "hidden_states": latents(patch=1),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": text_mask(),
        "timestep": steps(),
        "return_dict": False,
    }


def wan() -> Family:
    options = {"in_channels": VIDEO_CHANNELS, "out_channels": VIDEO_CHANNELS, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2}
    model = build(WanTransformer3DModel, **SIZES, **options, text_dim=TEXT_DIM, rope_max_seq_len=64)
    video = normal(BATCH, VIDEO_CHANNELS, FRAMES, 2 * ROWS, 2 * COLUMNS)
    return model, {"hidden_states": video, "encoder_hidden_states": text(), "timestep": steps(), "return_dict": False}


def lumina2() -> Family:
    """Grouped heads; every sample has its own number of text tokens, read from the mask on the host."""
    rope = {"axes_dim_rope": (4, 6, 6), "axes_lens": (32, 20, 22)}
    model = build(Lumina2Transformer2DModel, **LATENTS, **grouped_heads(), **rope, num_refiner_layers=1, cap_feat_dim=TEXT_DIM)
    return model, {
        "hidden_states": latents(),
        "timestep": steps(1.0),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": text_mask(),
        "return_dict": False,
    }


def qwen_image() -> Family:
    options = {"in_channels": PACKED_CHANNELS, "out_channels": 3, "num_layers": 2, "axes_dims_rope": (4, 6, 6)}
    model = build(QwenImageTransformer2DModel, **SIZES, **options, joint_attention_dim=TEXT_DIM)
    return model, {
        "hidden_states": normal(BATCH, TOKENS, PACKED_CHANNELS),
        "encoder_hidden_states": text(),
        "encoder_hidden_states_mask": text_mask(),
        "timestep": steps(1.0),
        "img_shapes": [[(1, ROWS, COLUMNS)]] * BATCH,
        "return_dict": False,
    }


def ltx() -> Family:
    options = {"in_channels": VIDEO_CHANNELS, "out_channels": VIDEO_CHANNELS, "num_layers": 2}
    model = build(LTXVideoTransformer3DModel, **SIZES, **options, cross_attention_dim=WIDTH, caption_channels=TEXT_DIM)
    return model, {
        "hidden_states": normal(BATCH, FRAMES * TOKENS, VIDEO_CHANNELS),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": text_mask(),
        "timestep": steps(),
        "num_frames": FRAMES,
        "height": ROWS,
        "width": COLUMNS,
        "rope_interpolation_scale": (0.32, 32.0, 32.0),
        "return_dict": False,
    }


FAMILIES: dict[str, Callable[[], Family]] = {
    "sd3": sd3,
    "sd3-dual": sd3_dual,
    "pixart": pixart,
    "flux": flux,
    "dit": dit,
    "vit": vit,
    "vit-registers": vit_registers,
    "bria": bria,
    "chroma": chroma,
    "cogview4": cogview4,
    "hunyuan-dit": hunyuan_dit,
    "aura-flow": aura_flow,
    "lumina-next": lumina_next,
    "sana": sana,
    "wan": wan,
    "lumina2": lumina2,
    "qwen-image": qwen_image,
    "ltx": ltx,
}
