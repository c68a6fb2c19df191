"""Image transformers whose text and image tokens are in one attention."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from tiny_models.base import (
    ATTENTION,
    CHANNELS,
    CROSS,
    HEAD_DIM,
    HEADS,
    PACKED,
    POOLED_DIM,
    REWRITE,
    SIZES,
    STILL,
    TEXT,
    TEXT_DIM,
    WIDTH,
    Size,
    configuration,
    latents,
    make,
    normal,
    positions,
    steps,
    text,
    text_mask,
    tuples,
    video,
)

GROUP = "Image: text and image in one attention"
LATENTS: dict[str, Any] = {"sample_size": 16, "patch_size": 2, "in_channels": CHANNELS}


def packed(size: Size, columns: str = "thw") -> dict[str, Any]:
    return tuples(
        hidden_states=normal(size.batch, size.tokens, PACKED),
        encoder_hidden_states=text(size),
        timestep=steps(size, 1.0),
        img_ids=positions(size, columns),
        txt_ids=torch.zeros(size.text, len(columns)),
    )


def pooled(size: Size) -> torch.Tensor:
    return normal(size.batch, POOLED_DIM, seed=4)


def sd3_inputs(size: Size) -> dict[str, Any]:
    return tuples(hidden_states=latents(size), encoder_hidden_states=text(size), pooled_projections=pooled(size), timestep=steps(size))


@configuration(GROUP, sd3_inputs)
def SD3Transformer2DModel() -> nn.Module:
    text_options = {"joint_attention_dim": TEXT_DIM, "caption_projection_dim": WIDTH, "pooled_projection_dim": POOLED_DIM}
    return make(
        diffusers.SD3Transformer2DModel, **ATTENTION, **LATENTS, **text_options, num_layers=3, out_channels=4, pos_embed_max_size=20
    )


@configuration(GROUP, sd3_inputs)
def SD3Transformer2DModel__dual() -> nn.Module:
    text_options = {"joint_attention_dim": TEXT_DIM, "caption_projection_dim": WIDTH, "pooled_projection_dim": POOLED_DIM}
    more = {"num_layers": 3, "out_channels": 4, "pos_embed_max_size": 20, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
    return make(diffusers.SD3Transformer2DModel, **ATTENTION, **LATENTS, **text_options, **more)


@configuration(GROUP, lambda s: {**packed(s), "pooled_projections": pooled(s), "guidance": torch.full((s.batch,), 3.5)})
def FluxTransformer2DModel() -> nn.Module:
    options = {"in_channels": PACKED, "num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True}
    return make(diffusers.FluxTransformer2DModel, **ATTENTION, **options, joint_attention_dim=TEXT_DIM, pooled_projection_dim=POOLED_DIM)


@configuration(GROUP, lambda s: {**packed(s, "thwl"), "guidance": torch.full((s.batch,), 3.5)})
def Flux2Transformer2DModel() -> nn.Module:
    options = {"in_channels": PACKED, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (4, 4, 4, 4)}
    return make(diffusers.Flux2Transformer2DModel, **ATTENTION, **options, joint_attention_dim=TEXT_DIM, timestep_guidance_channels=32)


@configuration(GROUP, packed)
def BriaTransformer2DModel() -> nn.Module:
    options = {"in_channels": PACKED, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": [4, 6, 6]}
    return make(diffusers.BriaTransformer2DModel, **ATTENTION, **options, joint_attention_dim=TEXT_DIM)


def chroma_inputs(size: Size) -> dict[str, Any]:
    """The mask covers text and image and is 0 or 1 in the dtype of the model, as its pipeline makes it: diffusers adds it to the scores."""
    mask = torch.cat([text_mask(size).float(), torch.ones(size.batch, size.tokens)], dim=1)
    return {**packed(size), "attention_mask": mask}


@configuration(GROUP, chroma_inputs)
def ChromaTransformer2DModel() -> nn.Module:
    options = {"in_channels": PACKED, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (4, 6, 6)}
    approximator = {"approximator_num_channels": 32, "approximator_hidden_dim": 40, "approximator_layers": 2}
    return make(diffusers.ChromaTransformer2DModel, **ATTENTION, **options, **approximator, joint_attention_dim=TEXT_DIM)


def cogview_inputs(size: Size) -> dict[str, Any]:
    """No mask, as in its pipeline."""
    pixels = torch.tensor([[16.0 * size.height, 16.0 * size.width]]).repeat(size.batch, 1)
    sizes = {"original_size": pixels, "target_size": pixels.clone(), "crop_coords": torch.zeros(size.batch, 2)}
    return tuples(hidden_states=latents(size), encoder_hidden_states=text(size), timestep=steps(size), **sizes)


@configuration(GROUP, cogview_inputs)
def CogView4Transformer2DModel() -> nn.Module:
    options = {"patch_size": 2, "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 1}
    return make(diffusers.CogView4Transformer2DModel, **ATTENTION, **options, text_embed_dim=TEXT_DIM, time_embed_dim=40, condition_dim=6)


@configuration(GROUP, cogview_inputs)
def CogView3PlusTransformer2DModel() -> nn.Module:
    options = {"patch_size": 2, "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 1, "pos_embed_max_size": 20}
    options |= {"text_embed_dim": TEXT_DIM, "time_embed_dim": 40, "condition_dim": 6, "sample_size": 16}
    return make(diffusers.CogView3PlusTransformer2DModel, **ATTENTION, **options)


@configuration(GROUP, lambda s: tuples(hidden_states=latents(s), encoder_hidden_states=text(s), timestep=steps(s, 1.0)))
def AuraFlowTransformer2DModel() -> nn.Module:
    options = {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "out_channels": CHANNELS, "pos_embed_max_size": 256}
    text_options = {"joint_attention_dim": TEXT_DIM, "caption_projection_dim": WIDTH}
    return make(diffusers.AuraFlowTransformer2DModel, **ATTENTION, **LATENTS, **options, **text_options)


MAIN = {"transformer_blocks.*": REWRITE, "single_transformer_blocks.*": REWRITE}  # the usual names of the blocks of two streams and of one


def image_and_text(size: Size) -> dict[str, Any]:
    return tuples(hidden_states=latents(size), encoder_hidden_states=text(size), timestep=steps(size))


def fibo_inputs(size: Size) -> dict[str, Any]:
    layers = [text(size, 20, seed=5 + layer) for layer in range(2)]
    return {**packed(size), "text_encoder_layers": layers}


@configuration(GROUP, fibo_inputs)
def BriaFiboTransformer2DModel() -> nn.Module:
    options = {"in_channels": PACKED, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": [4, 6, 6]}
    return make(diffusers.BriaFiboTransformer2DModel, **ATTENTION, **options, joint_attention_dim=TEXT_DIM, text_encoder_dim=20)


def fibo2_inputs(size: Size) -> dict[str, Any]:
    bundles = normal(size.batch, 2, size.text, TEXT_DIM, seed=3)  # for the perceiver, and for the one block that has cross-attention
    return tuples(hidden_states=latents(size), timestep=steps(size, 1.0), encoder_hidden_states=bundles)


@configuration(GROUP, fibo2_inputs, {"perceiver*": TEXT, "layers.1.cross*": CROSS, "noise_refiner.*": REWRITE, "layers.*": REWRITE})
def BriaFibo2Transformer2DModel() -> nn.Module:
    gist = {"min_num_gist_tokens": 4, "max_num_gist_tokens": 9, "gist_step": 4, "gist_min_text_len": 4, "gist_max_text_len": 20}
    options = {"n_layers": 2, "n_refiner_layers": 1, "injection_layer_ids": (1,), "perceiver_num_layers": 1}
    rope = {"axes_dims": (4, 6, 6), "axes_lens": (32, 20, 22)}
    model = diffusers.BriaFibo2Transformer2DModel
    return make(model, in_channels=CHANNELS, dim=WIDTH, n_heads=HEADS, cap_feat_dim=TEXT_DIM, **options, **gist, **rope)


@configuration(GROUP, lambda s: packed(s, "thwl"), {"txt_mode_blocks.*": TEXT, "*": REWRITE}, note="blocks of the text alone first")
def Flux3Transformer2DModel() -> nn.Module:
    options = {"in_channels": PACKED, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (4, 4, 4, 4)}
    return make(diffusers.Flux3Transformer2DModel, **ATTENTION, **options, joint_attention_dim=TEXT_DIM, timestep_channels=32)


@configuration(GROUP, lambda s: {**packed(s), "guidance": None})
def LongCatImageTransformer2DModel() -> nn.Module:
    options = {"in_channels": PACKED, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": [4, 6, 6]}
    dims = {"joint_attention_dim": TEXT_DIM, "pooled_projection_dim": POOLED_DIM}
    return make(diffusers.LongCatImageTransformer2DModel, **ATTENTION, **options, **dims)


@configuration(GROUP, packed)
def OvisImageTransformer2DModel() -> nn.Module:
    options = {"in_channels": PACKED, "out_channels": PACKED, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (4, 6, 6)}
    return make(diffusers.OvisImageTransformer2DModel, **ATTENTION, **options, joint_attention_dim=TEXT_DIM)


def glm_inputs(size: Size) -> dict[str, Any]:
    tokens = torch.randint(0, 64, (size.batch, size.tokens), generator=torch.Generator().manual_seed(6))
    sizes = {"target_size": torch.tensor([[16.0 * size.height, 16.0 * size.width]] * size.batch), "crop_coords": torch.zeros(size.batch, 2)}
    prior = {"prior_token_id": tokens, "prior_token_drop": torch.arange(size.batch) == 1}
    return {**image_and_text(size), **prior, **sizes}


@configuration(GROUP, glm_inputs)
def GlmImageTransformer2DModel() -> nn.Module:
    options = {
        "patch_size": 2,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 1,
        "time_embed_dim": 40,
        "condition_dim": 6,
    }
    dims = {"text_embed_dim": TEXT_DIM, "prior_vq_quantizer_codebook_size": 64}
    return make(diffusers.GlmImageTransformer2DModel, **ATTENTION, **options, **dims)


def hidream_inputs(size: Size) -> dict[str, Any]:
    llama = torch.stack([text(size, TEXT_DIM, seed=5), text(size, TEXT_DIM, seed=6)])
    return tuples(
        hidden_states=latents(size),
        timesteps=steps(size),
        encoder_hidden_states_t5=text(size, 20, length=size.text + 2),
        encoder_hidden_states_llama3=llama,
        pooled_embeds=pooled(size),
    )


@configuration(GROUP, hidream_inputs, error="numpy", note="a loop over data says which expert computes which tokens")
def HiDreamImageTransformer2DModel() -> nn.Module:
    options = {"patch_size": 2, "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 1, "num_single_layers": 1}
    captions = {"caption_channels": [20, TEXT_DIM], "text_emb_dim": POOLED_DIM, "llama_layers": (0, 1)}
    experts = {"num_routed_experts": 2, "num_activated_experts": 2, "axes_dims_rope": (4, 6, 6), "max_resolution": (32, 32)}
    model = diffusers.HiDreamImageTransformer2DModel
    return make(model, **ATTENTION, **options, **captions, **experts, force_inference_output=True)


@configuration(
    GROUP,
    lambda s: {**image_and_text(s), "hidden_states": latents(s, patch=1), "encoder_attention_mask": text_mask(s)},
    {**MAIN, "context_embedder*": TEXT},
)
def HunyuanImageTransformer2DModel() -> nn.Module:
    options = {"in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
    return make(diffusers.HunyuanImageTransformer2DModel, **ATTENTION, **options, text_embed_dim=TEXT_DIM, rope_axes_dim=(8, 8))


def ideogram_inputs(size: Size) -> dict[str, Any]:
    """Text and image share one sequence; roles, samples and places are inputs."""
    from diffusers.models.transformers import transformer_ideogram4 as home

    shape, words = (size.batch, size.text + size.tokens), size.text
    roles = torch.full(shape, home.OUTPUT_IMAGE_INDICATOR)
    roles[:, :words] = home.LLM_TOKEN_INDICATOR
    image = positions(size, "thw").long() + home.IMAGE_POSITION_OFFSET
    ids = torch.cat([torch.arange(words)[:, None].expand(words, 3), image]).expand(size.batch, -1, 3)
    return tuples(
        hidden_states=normal(*shape, PACKED) * (roles == home.OUTPUT_IMAGE_INDICATOR)[..., None],
        encoder_hidden_states=normal(*shape, TEXT_DIM, seed=3) * (roles == home.LLM_TOKEN_INDICATOR)[..., None],
        timestep=steps(size, 1.0),
        position_ids=ids.clone(),
        segment_ids=torch.ones(shape, dtype=torch.long),
        indicator=roles,
    )


@configuration(
    GROUP,
    ideogram_inputs,
    {"*": "keep: .*differs from query to query"},
    note="which tokens are the image's is data, and so is who sees whom",
)
def Ideogram4Transformer2DModel() -> nn.Module:
    options = {"in_channels": PACKED, "num_layers": 1, "intermediate_size": 40, "adaln_dim": 20, "llm_features_dim": TEXT_DIM}
    return make(diffusers.Ideogram4Transformer2DModel, **ATTENTION, **options, rope_theta=10_000, mrope_section=(4, 2, 2))


@configuration(
    GROUP,
    lambda s: {**image_and_text(s), "hidden_states": video(s._replace(frames=1), CHANNELS)},
    sizes=STILL,
    note="an image is a video of one frame",
)
def JoyImageEditTransformer3DModel() -> nn.Module:
    options = {"in_channels": CHANNELS, "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_layers": 1, "rope_dim_list": [4, 6, 6]}
    return make(diffusers.JoyImageEditTransformer3DModel, **options, patch_size=[1, 2, 2], text_dim=TEXT_DIM)


def joy_plus_inputs(size: Size) -> dict[str, Any]:
    patches = normal(size.batch, size.tokens, CHANNELS, 1, 2, 2)
    return {**image_and_text(size), "hidden_states": patches, "shape_list": [[(1, size.height, size.width)] for _ in range(size.batch)]}


@configuration(GROUP, joy_plus_inputs, sizes=STILL, note="an image is a video of one frame")
def JoyImageEditPlusTransformer3DModel() -> nn.Module:
    options = {"in_channels": CHANNELS, "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_layers": 1, "rope_dim_list": [4, 6, 6]}
    return make(diffusers.JoyImageEditPlusTransformer3DModel, **options, patch_size=[1, 2, 2], text_dim=TEXT_DIM)


def krea_inputs(size: Size) -> dict[str, Any]:
    ids = torch.cat([torch.zeros(size.text, 3), positions(size)])
    return tuples(
        hidden_states=normal(size.batch, size.tokens, PACKED),
        encoder_hidden_states=normal(size.batch, size.text, 2, TEXT_DIM, seed=3),
        timestep=steps(size, 1.0),
        position_ids=ids,
        encoder_attention_mask=text_mask(size).bool(),
    )


@configuration(GROUP, krea_inputs, {"transformer_blocks.*": REWRITE, "text*": TEXT})
def Krea2Transformer2DModel() -> nn.Module:
    words = {"text_hidden_dim": TEXT_DIM, "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 1}
    blocks = {"text_intermediate_size": 20, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "timestep_embed_dim": 32}
    options = {"in_channels": PACKED, "num_layers": 1, "intermediate_size": 40, "axes_dims_rope": (4, 6, 6)}
    heads = {"attention_head_dim": HEAD_DIM, "num_attention_heads": 6, "num_key_value_heads": 3}
    return make(diffusers.Krea2Transformer2DModel, **heads, **options, **words, **blocks)


GROUPED: dict[str, Any] = {"hidden_size": 6 * HEAD_DIM, "num_attention_heads": 6, "num_kv_heads": 3, "multiple_of": 32, "num_layers": 1}
REFINED = {"layers.*": REWRITE, "noise_refiner.*": REWRITE, "context_refiner.*": TEXT}


def lumina_inputs(size: Size) -> dict[str, Any]:
    return {**image_and_text(size), "timestep": steps(size, 1.0), "encoder_attention_mask": text_mask(size)}


@configuration(GROUP, lumina_inputs, REFINED, error="data", note="the number of text tokens of each sample is data")
def Lumina2Transformer2DModel() -> nn.Module:
    rope = {"axes_dim_rope": (4, 6, 6), "axes_lens": (32, 20, 22)}
    return make(diffusers.Lumina2Transformer2DModel, **LATENTS, **GROUPED, **rope, num_refiner_layers=1, cap_feat_dim=TEXT_DIM)


def qwen_inputs(size: Size) -> dict[str, Any]:
    return tuples(
        hidden_states=normal(size.batch, size.tokens, PACKED),
        encoder_hidden_states=text(size),
        encoder_hidden_states_mask=text_mask(size),
        timestep=steps(size, 1.0),
        img_shapes=[[(1, size.height, size.width)] for _ in range(size.batch)],
    )


@configuration(GROUP, qwen_inputs)
def QwenImageTransformer2DModel() -> nn.Module:
    options = {"in_channels": PACKED, "out_channels": 3, "num_layers": 1, "axes_dims_rope": (4, 6, 6)}
    return make(diffusers.QwenImageTransformer2DModel, **ATTENTION, **options, joint_attention_dim=TEXT_DIM)


def qwen21_inputs(size: Size) -> dict[str, Any]:
    slots = torch.zeros(size.batch, size.text + size.tokens // 4, dtype=torch.bool)  # one of the language model's for four image tokens
    slots[:, size.text :] = True
    return {**qwen_inputs(size), "img_mask": slots}


@configuration(
    GROUP, qwen21_inputs, {"*": REWRITE}, error="data", note="where the image tokens stand is data, and attention is block-causal"
)
def QwenImage21Transformer2DModel() -> nn.Module:
    options = {"in_channels": PACKED, "out_channels": PACKED, "num_layers": 1, "axes_dims_rope": (4, 6, 6), "mlp_ratio": 2}
    return make(diffusers.QwenImage21Transformer2DModel, **ATTENTION, **options, context_in_dim=TEXT_DIM)


def nucleus_inputs(size: Size) -> dict[str, Any]:
    return {**qwen_inputs(size), "img_shapes": [(1, size.height, size.width) for _ in range(size.batch)]}


@configuration(GROUP, nucleus_inputs, note="image queries over image and text keys")
def NucleusMoEImageTransformer2DModel() -> nn.Module:
    options = {"in_channels": PACKED, "out_channels": 3, "num_layers": 1, "axes_dims_rope": (4, 6, 6), "moe_enabled": False}
    more = {"joint_attention_dim": TEXT_DIM, "capacity_factors": [8.0]}
    return make(diffusers.NucleusMoEImageTransformer2DModel, **ATTENTION, **options, **more)


@configuration(GROUP, nucleus_inputs, note="image queries over image and text keys; experts chosen by data")
def NucleusMoEImageTransformer2DModel__experts() -> nn.Module:
    options = {"in_channels": PACKED, "out_channels": 3, "num_layers": 1, "axes_dims_rope": (4, 6, 6), "moe_enabled": True}
    experts = {"num_experts": 4, "moe_intermediate_dim": 20, "capacity_factors": [2.0], "dense_moe_strategy": "none"}
    return make(diffusers.NucleusMoEImageTransformer2DModel, **ATTENTION, **options, **experts, joint_attention_dim=TEXT_DIM)


def omnigen_inputs(size: Size) -> dict[str, Any]:
    """Text, a time token and the image in one sequence; the text is causal, the image sees everything."""
    words, whole = size.text, size.text + 1 + size.tokens
    mask = torch.ones(whole, whole).tril()
    mask[words + 1 :] = 1
    return tuples(
        hidden_states=latents(size),
        timestep=steps(size, 1.0),
        input_ids=torch.arange(words).expand(size.batch, -1).clone(),
        input_img_latents=[],
        input_image_sizes={},
        attention_mask=mask.expand(size.batch, -1, -1).clone(),
        position_ids=torch.arange(whole).expand(size.batch, -1).clone(),
    )


@configuration(
    GROUP,
    omnigen_inputs,
    {"*": "keep: .*differs from query to query"},
    error="control flow",
    note="text is causal beside an image that is not",
)
def OmniGenTransformer2DModel() -> nn.Module:
    heads = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "intermediate_size": 40, "num_layers": 1}
    rope = {"rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8}}
    options = {"in_channels": CHANNELS, "pad_token_id": 0, "vocab_size": 100, "time_step_dim": 32}
    return make(diffusers.OmniGenTransformer2DModel, **heads, **options, **rope)


@configuration(GROUP, lambda s: {**image_and_text(s), "timestep": steps(s, 1.0)}, note="image queries over image and text keys")
def PRXTransformer2DModel() -> nn.Module:
    options = {"in_channels": CHANNELS, "hidden_size": WIDTH, "num_heads": HEADS, "depth": 1, "axes_dim": [8, 8], "mlp_ratio": 2.0}
    return make(diffusers.PRXTransformer2DModel, **options, context_in_dim=TEXT_DIM)


def ernie_inputs(size: Size) -> dict[str, Any]:
    lengths = torch.full((size.batch,), size.text)
    lengths[1:] -= 2
    return tuples(hidden_states=latents(size, patch=1), timestep=steps(size, 1.0), text_bth=text(size), text_lens=lengths)


@configuration(GROUP, ernie_inputs)
def ErnieImageTransformer2DModel() -> nn.Module:
    options = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_layers": 1, "ffn_hidden_size": 40, "patch_size": 1}
    dims = {"in_channels": CHANNELS, "out_channels": CHANNELS, "text_in_dim": TEXT_DIM, "rope_axes_dim": (4, 6, 6)}
    return make(diffusers.ErnieImageTransformer2DModel, **options, **dims)


def z_image_inputs(size: Size) -> dict[str, Any]:
    """Lists of images and texts; the number of tokens is padded up to a multiple of 32."""
    images = [normal(CHANNELS, 1, 2 * size.height, 2 * size.width, seed=8 + i) for i in range(size.batch)]
    return tuples(x=images, t=steps(size, 1.0), cap_feats=[normal(size.text, TEXT_DIM, seed=3 + i) for i in range(size.batch)])


@configuration(
    GROUP,
    z_image_inputs,
    REFINED,
    sizes=(SIZES[0]._replace(height=8, width=12), SIZES[1]._replace(height=16, width=10)),
    note="lists of images; multiples of 32 tokens, others are padded",
)
def ZImageTransformer2DModel() -> nn.Module:
    options = {"dim": WIDTH, "n_layers": 1, "n_refiner_layers": 1, "n_heads": HEADS, "n_kv_heads": HEADS, "in_channels": CHANNELS}
    rope = {"axes_dims": [4, 6, 6], "axes_lens": [128, 32, 32]}
    return make(diffusers.ZImageTransformer2DModel, **options, **rope, cap_feat_dim=TEXT_DIM)
