"""Video transformers: attention over space and time, alone or together with text; with text in cross-attention; or space and time apart."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from tiny_models.base import (
    ATTENTION,
    CROSS,
    EITHER,
    HEAD_DIM,
    HEADS,
    KEEP,
    LINEAR,
    POOLED_DIM,
    REWRITE,
    SIZES,
    TEXT,
    TEXT_DIM,
    VIDEO,
    WIDTH,
    Size,
    configuration,
    make,
    normal,
    steps,
    text,
    text_mask,
    tuples,
    video,
)

CROSSED_GROUP, JOINT_GROUP = "Video: cross-attention to text", "Video: text and video in one attention"
CLIP: dict[str, Any] = {"dimensions": 3}
LATENTS: dict[str, Any] = {"in_channels": VIDEO, "out_channels": VIDEO}
CROSSED = {"*attn1": REWRITE, "*attn2": CROSS}
MAIN = {"transformer_blocks.*": REWRITE, "single_transformer_blocks.*": REWRITE}
WITH_REFINER = {**MAIN, "context_embedder*": TEXT}


def video_and_text(size: Size) -> dict[str, Any]:
    return tuples(hidden_states=video(size), encoder_hidden_states=text(size), timestep=steps(size))


def packed_video(size: Size) -> dict[str, Any]:
    return {**video_and_text(size), "hidden_states": normal(size.batch, size.frames * size.tokens, VIDEO)}


def frames_first(size: Size) -> dict[str, Any]:
    return {**video_and_text(size), "hidden_states": video(size).transpose(1, 2).contiguous()}


def pooled(size: Size) -> torch.Tensor:
    return normal(size.batch, POOLED_DIM, seed=4)


# ---------------------------------------------------------------------------------------------- cross-attention to text

WAN: dict[str, Any] = {**ATTENTION, **LATENTS, "freq_dim": 32, "ffn_dim": 40, "num_layers": 1, "text_dim": TEXT_DIM, "rope_max_seq_len": 64}


@configuration(CROSSED_GROUP, video_and_text, CROSSED, **CLIP)
def WanTransformer3DModel() -> nn.Module:
    return make(diffusers.WanTransformer3DModel, **WAN)


def with_image(size: Size) -> dict[str, Any]:
    return {**video_and_text(size), "encoder_hidden_states_image": text(size, 20, length=5)}


@configuration(CROSSED_GROUP, with_image, CROSSED, **CLIP, note="keys of a picture and of a text in cross-attention")
def WanTransformer3DModel__image() -> nn.Module:
    return make(diffusers.WanTransformer3DModel, **WAN, image_dim=20, added_kv_proj_dim=WIDTH)


def vace_inputs(size: Size) -> dict[str, Any]:
    return {**video_and_text(size), "control_hidden_states": video(size, 12), "control_hidden_states_scale": torch.tensor([0.7])}


@configuration(CROSSED_GROUP, vace_inputs, CROSSED, **CLIP)
def WanVACETransformer3DModel() -> nn.Module:
    return make(diffusers.WanVACETransformer3DModel, **WAN, vace_layers=[0], vace_in_channels=12)


def animate_inputs(size: Size) -> dict[str, Any]:
    """Twelve channels of latents, a pose one frame shorter, and a face video of which the encoder keeps every fourth frame."""
    pose = normal(size.batch, 4, size.frames - 1, 2 * size.height, 2 * size.width, seed=5)
    face = normal(size.batch, 3, 4 * (size.frames - 1) - 3, 16, 16, seed=6)
    return {**with_image(size), "hidden_states": video(size, 12), "pose_hidden_states": pose, "face_pixel_values": face}


@configuration(
    CROSSED_GROUP, animate_inputs, {**CROSSED, "face_adapter*": KEEP}, **CLIP, note="a face seen by cross-attention, frame by frame"
)
def WanAnimateTransformer3DModel() -> nn.Module:
    face = {"face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 1, "motion_encoder_size": 16}
    motion = {
        "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 16,
    }
    channels = {"in_channels": 12, "latent_channels": 4, "out_channels": 4, "image_dim": 20}
    return make(diffusers.WanAnimateTransformer3DModel, **{**WAN, **channels}, **face, **motion)


@configuration(CROSSED_GROUP, video_and_text, CROSSED, **CLIP)
def ChronoEditTransformer3DModel() -> nn.Module:
    return make(diffusers.ChronoEditTransformer3DModel, **WAN, rope_temporal_skip_len=8)


@configuration(CROSSED_GROUP, lambda s: {**video_and_text(s), "timestep": steps(s).long()}, CROSSED, **CLIP)
def SkyReelsV2Transformer3DModel() -> nn.Module:
    return make(diffusers.SkyReelsV2Transformer3DModel, **WAN)


def anyflow_inputs(size: Size) -> dict[str, Any]:
    times = steps(size)[:, None].expand(size.batch, size.frames).clone()
    return {**frames_first(size), "timestep": times, "r_timestep": times / 2}


@configuration(CROSSED_GROUP, anyflow_inputs, CROSSED, **CLIP, note="frames before channels")
def AnyFlowTransformer3DModel() -> nn.Module:
    return make(diffusers.AnyFlowTransformer3DModel, **WAN)


EVEN = (SIZES[0]._replace(frames=4), SIZES[1]._replace(height=8, width=6, frames=6))


def far_inputs(size: Size) -> dict[str, Any]:
    return {**anyflow_inputs(size), "chunk_partition": [2] * (size.frames // 2)}


@configuration(
    CROSSED_GROUP,
    far_inputs,
    {"*attn1": KEEP, "*attn2": CROSS},
    **CLIP,
    sizes=EVEN,
    error="flex|mask",
    note="causal in chunks of frames, by flex_attention",
)
def AnyFlowFARTransformer3DModel() -> nn.Module:
    return make(diffusers.AnyFlowFARTransformer3DModel, **WAN, full_chunk_limit=3, compressed_patch_size=(1, 4, 4))


@configuration(CROSSED_GROUP, video_and_text, CROSSED, **CLIP)
def HeliosTransformer3DModel() -> nn.Module:
    options = {key: value for key, value in WAN.items() if key != "rope_max_seq_len"}
    return make(diffusers.HeliosTransformer3DModel, **options, rope_dim=(4, 6, 6), guidance_cross_attn=False, zero_history_timestep=False)


def helios_inputs(size: Size) -> dict[str, Any]:
    """The video that is made, and three runs of frames before it, each at a coarser grid."""
    short, mid, long = 1, 2, 4
    frames = {name: video(size._replace(frames=count)) for name, count in (("short", short), ("mid", mid), ("long", long))}
    places = {"short": torch.arange(6, 7), "mid": torch.arange(4, 6), "long": torch.arange(4)}
    given = {f"latents_history_{name}": value for name, value in frames.items()}
    given |= {f"indices_latents_history_{name}": value.expand(size.batch, -1).clone() for name, value in places.items()}
    return {**video_and_text(size), **given, "indices_hidden_states": torch.arange(7, 7 + size.frames).expand(size.batch, -1).clone()}


@configuration(
    CROSSED_GROUP, helios_inputs, {"*attn1": EITHER, "*attn2": CROSS}, **CLIP, note="four grids of different fineness in one sequence"
)
def HeliosTransformer3DModel__history() -> nn.Module:
    options = {key: value for key, value in WAN.items() if key != "rope_max_seq_len"}
    return make(diffusers.HeliosTransformer3DModel, **options, rope_dim=(4, 6, 6))


def cosmos_inputs(size: Size) -> dict[str, Any]:
    padding = torch.zeros(1, 1, 2 * size.height, 2 * size.width)
    return {**video_and_text(size), "timestep": steps(size, 1.0), "fps": 30, "padding_mask": padding}


@configuration(CROSSED_GROUP, cosmos_inputs, CROSSED, **CLIP)
def CosmosTransformer3DModel() -> nn.Module:
    options = {"num_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": TEXT_DIM, "adaln_lora_dim": 20, "max_size": (4, 32, 32)}
    return make(diffusers.CosmosTransformer3DModel, **ATTENTION, **LATENTS, **options)


def allegro_inputs(size: Size) -> dict[str, Any]:
    """Rotations in tables, one for each axis, with the place of every token in them, as its pipeline makes them."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    corners = ((0, 0), (size.height, size.width))
    *tables, times, rows, columns = get_3d_rotary_pos_embed_allegro(24, corners, (size.height, size.width), size.frames)
    places = torch.cartesian_prod(times, rows, columns)
    t, h, w = (places[None, :, axis].contiguous() for axis in range(3))
    rotations = (tuple(tables), (t.long(), h.long(), w.long()))
    return {**video_and_text(size), "encoder_attention_mask": text_mask(size), "image_rotary_emb": rotations}


@configuration(CROSSED_GROUP, allegro_inputs, CROSSED, **CLIP)
def AllegroTransformer3DModel() -> nn.Module:
    options = {"num_layers": 1, "cross_attention_dim": 72, "caption_channels": TEXT_DIM, "sample_frames": 4}
    heads = {"num_attention_heads": HEADS, "attention_head_dim": 24}
    return make(diffusers.AllegroTransformer3DModel, **heads, **LATENTS, **options, sample_height=16, sample_width=20)


def ltx_inputs(size: Size) -> dict[str, Any]:
    shape = {"num_frames": size.frames, "height": size.height, "width": size.width, "rope_interpolation_scale": (0.32, 32.0, 32.0)}
    return {**packed_video(size), "encoder_attention_mask": text_mask(size), **shape}


@configuration(CROSSED_GROUP, ltx_inputs, CROSSED, **CLIP)
def LTXVideoTransformer3DModel() -> nn.Module:
    options = {"num_layers": 1, "cross_attention_dim": WIDTH, "caption_channels": TEXT_DIM}
    return make(diffusers.LTXVideoTransformer3DModel, **ATTENTION, **LATENTS, **options)


def ltx2_inputs(size: Size) -> dict[str, Any]:
    sound = size.frames * 3
    return {
        **packed_video(size),
        "audio_hidden_states": normal(size.batch, sound, 6, seed=5),
        "audio_encoder_hidden_states": text(size, seed=6),
        "encoder_attention_mask": text_mask(size),
        "audio_encoder_attention_mask": text_mask(size),
        "num_frames": size.frames,
        "height": size.height,
        "width": size.width,
        "audio_num_frames": sound,
    }


LTX2: dict[str, Any] = {
    **ATTENTION,
    **LATENTS,
    "num_layers": 1,
    "cross_attention_dim": WIDTH,
    "caption_channels": TEXT_DIM,
    "rope_double_precision": False,
    "audio_in_channels": 6,
    "audio_out_channels": 6,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
}
SOUND = {"*.attn1": REWRITE, "*.attn2": CROSS, "*audio_attn*": KEEP, "*video_to_audio*": KEEP, "*audio_to_video*": KEEP}


@configuration(CROSSED_GROUP, ltx2_inputs, SOUND, **CLIP, note="sound beside the video, each seen by the other in cross-attention")
def LTX2VideoTransformer3DModel() -> nn.Module:
    return make(diffusers.LTX2VideoTransformer3DModel, **LTX2)


def refiner_inputs(size: Size) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMLTX2AudioVideoRotaryPosEmbed

    bases = {
        "base_num_frames": 20,
        "base_height": 2048,
        "base_width": 2048,
        "scale_factors": (8, 32, 32),
        "patch_size": 1,
        "patch_size_t": 1,
    }
    rope = SanaWMLTX2AudioVideoRotaryPosEmbed(dim=WIDTH, modality="video", double_precision=False, num_attention_heads=HEADS, **bases)
    places = rope.prepare_video_coords(size.batch, size.frames, size.height, size.width, device="cpu", fps=24.0)
    times = steps(size)[:, None].expand(size.batch, size.frames * size.tokens).clone()
    given = {"timestep": times, "video_rotary_emb": rope(places, device="cpu"), "encoder_attention_mask": text_mask(size).float()}
    return {**packed_video(size), **given}


@configuration(CROSSED_GROUP, refiner_inputs, CROSSED, **CLIP, stated=True, note="nothing in its inputs tells the grid")
def SanaWMLTX2RefinerTransformer3DModel() -> nn.Module:
    return make(diffusers.SanaWMLTX2RefinerTransformer3DModel, **LTX2)


@configuration(
    CROSSED_GROUP,
    lambda s: {**video_and_text(s), "encoder_attention_mask": text_mask(s)},
    {"*attn1": LINEAR, "*attn2": CROSS},
    **CLIP,
    note="its self-attention is linear already",
)
def SanaVideoTransformer3DModel() -> nn.Module:
    cross = {"num_cross_attention_heads": HEADS, "cross_attention_head_dim": HEAD_DIM, "cross_attention_dim": WIDTH}
    options = {"num_layers": 1, "caption_channels": TEXT_DIM, "sample_size": 16, "rope_max_seq_len": 64}
    return make(diffusers.SanaVideoTransformer3DModel, **ATTENTION, **LATENTS, **cross, **options)


def sana_world_inputs(size: Size) -> dict[str, Any]:
    """A camera that moves forward: a pose matrix and four intrinsic numbers a frame."""
    pose = torch.eye(4).repeat(size.batch, size.frames, 1, 1)
    pose[..., 2, 3] = 0.1 * torch.arange(size.frames)
    lens = torch.tensor([float(size.width), float(size.height), size.width / 2, size.height / 2]).expand(size.batch, size.frames, 4)
    return tuples(
        hidden_states=video(size, patch=1),
        timestep=(steps(size)[:, None, None].expand(size.batch, 1, size.frames)).clone(),
        encoder_hidden_states=text(size)[:, None],
        encoder_attention_mask=torch.ones(size.batch, size.text, dtype=torch.long),
        camera_conditions=torch.cat([pose.flatten(2), lens], -1),
        chunk_plucker=video(size, 12, patch=1),
    )


@configuration(
    CROSSED_GROUP,
    sana_world_inputs,
    {"blocks.1.attn*": "keep: one module runs", "blocks.0.attn*": "keep: .*(linear|no softmax)", "*cross_attn*": CROSS},
    **CLIP,
)
def SanaWMTransformer3DModel() -> nn.Module:
    options = {"num_layers": 2, "softmax_every_n": 2, "linear_head_dim": HEAD_DIM, "chunk_plucker_channels": 12, "mlp_ratio": 2.0}
    dims = {"in_channels": VIDEO, "hidden_size": 2 * HEAD_DIM, "num_attention_heads": 2, "caption_channels": TEXT_DIM}
    return make(diffusers.SanaWMTransformer3DModel, **dims, **options, chunk_plucker_post_attn_blocks=2)


@configuration(
    CROSSED_GROUP,
    lambda s: {**video_and_text(s), "encoder_attention_mask": None},
    {"transformer_blocks.*attn1": REWRITE, "temporal_transformer_blocks.*attn1": KEEP, "*attn2": CROSS},
    sizes=(SIZES[0], SIZES[1]._replace(frames=3)),
    note="attention within frames, and along time",
)
def LatteTransformer3DModel() -> nn.Module:
    options = {"num_layers": 1, "cross_attention_dim": WIDTH, "caption_channels": TEXT_DIM, "patch_size": 2, "video_length": 3}
    norms = {
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "num_embeds_ada_norm": 1000,
        "activation_fn": "gelu-approximate",
    }
    return make(diffusers.LatteTransformer3DModel, **ATTENTION, **LATENTS, **options, **norms, sample_size=16, attention_bias=True)


def kandinsky5_inputs(size: Size) -> dict[str, Any]:
    clip = normal(size.batch, size.frames, 2 * size.height, 2 * size.width, VIDEO)
    places = [torch.arange(count) for count in (size.frames, size.height, size.width)]
    given = {"pooled_projections": pooled(size), "visual_rope_pos": places, "text_rope_pos": torch.arange(size.text)}
    return {**video_and_text(size), "hidden_states": clip, **given, "return_dict": True}


KANDINSKY = {"*visual*self_attention*": REWRITE, "*text*self_attention*": TEXT, "*cross_attention*": CROSS}


@configuration(CROSSED_GROUP, kandinsky5_inputs, KANDINSKY, **CLIP, note="channels last")
def Kandinsky5Transformer3DModel() -> nn.Module:
    options = {"in_visual_dim": VIDEO, "out_visual_dim": VIDEO, "in_text_dim": TEXT_DIM, "in_text_dim2": POOLED_DIM, "time_dim": 32}
    blocks = {"num_text_blocks": 1, "num_visual_blocks": 1, "model_dim": WIDTH, "ff_dim": 40, "axes_dims": (4, 6, 6)}
    return make(diffusers.Kandinsky5Transformer3DModel, **options, **blocks)


def kandinsky6_inputs(size: Size) -> dict[str, Any]:
    clip = normal(size.batch, size.frames, 2 * size.height, 2 * size.width, 2 * VIDEO + 1)
    return {**video_and_text(size), "hidden_states": clip, "pooled_projections": pooled(size)}


@configuration(
    CROSSED_GROUP,
    kandinsky6_inputs,
    {"*text*": TEXT, "*cross_attention*": CROSS, "*self_attention*": REWRITE},
    **CLIP,
    note="channels last",
)
def Kandinsky6Transformer3DModel() -> nn.Module:
    options = {"in_visual_dim": VIDEO, "out_visual_dim": VIDEO, "in_text_dim": TEXT_DIM, "in_text_dim2": POOLED_DIM, "time_dim": 32}
    blocks = {"num_text_blocks": 1, "num_visual_blocks": 1, "model_dim": WIDTH, "ff_dim": 40, "axes_dims": (4, 6, 6)}
    return make(diffusers.Kandinsky6Transformer3DModel, **options, **blocks, in_audio_dim=6, out_audio_dim=6)


TILES = (SIZES[0]._replace(height=8, width=16), SIZES[1]._replace(height=16, width=8))


@configuration(
    CROSSED_GROUP,
    lambda s: tuples(hidden_states=normal(s.batch, s.frames, s.height, s.width, 2 * VIDEO + 1), timestep=steps(s)),
    {"*": KEEP},
    **CLIP,
    sizes=TILES,
    error="flex|sparse|data|mask|symbol",
    note="sparse attention over blocks of 64 tokens that the data chooses",
)
def Kandinsky6SRTransformer3DModel() -> nn.Module:
    options = {"in_visual_dim": VIDEO, "out_visual_dim": VIDEO, "time_dim": 32, "num_visual_blocks": 1, "axes_dims": (4, 6, 6)}
    return make(diffusers.Kandinsky6SRTransformer3DModel, **options, patch_size=(1, 1, 1), model_dim=WIDTH, ff_dim=40)


def animate2_inputs(size: Size) -> dict[str, Any]:
    """The pass over the reference video, which fills a cache of keys and values; lists of samples."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    shape = (size.frames, 2 * size.height, 2 * size.width)
    return tuples(
        hidden_states=[normal(VIDEO, *shape, seed=2 + i) for i in range(size.batch)],
        condition_latents=[normal(12, *shape, seed=12 + i) for i in range(size.batch)],
        encoder_hidden_states=[normal(size.text, TEXT_DIM, seed=22 + i) for i in range(size.batch)],
        timestep=torch.ones(size.batch),
        encoder_hidden_states_image=normal(size.batch, 5, 1280, seed=7),
        kv_cache=WanAnimate2KVCache(1),
        kv_cache_mode="extract",
        seq_len=size.frames * size.tokens,
        offset_grid_sizes=torch.tensor([[size.frames, size.height, size.width]]),
    )


@configuration(
    CROSSED_GROUP,
    animate2_inputs,
    {"*self*": KEEP, "*cross*": CROSS},
    **CLIP,
    error="WanAnimate2KVCache",
    note="each pass writes or reads a cache of keys and values that is an argument",
)
def WanAnimate2Transformer3DModel() -> nn.Module:
    options = {"text_len": 16, "in_dim": VIDEO + 12, "out_dim": VIDEO, "dim": WIDTH, "ffn_dim": 40, "freq_dim": 32, "text_dim": TEXT_DIM}
    return make(diffusers.WanAnimate2Transformer3DModel, **options, num_heads=HEADS, num_layers=1)


# ---------------------------------------------------------------------------------------------- text and video in one attention


@configuration(
    JOINT_GROUP, frames_first, **CLIP, sizes=(SIZES[0], SIZES[1]._replace(text=7)), note="frames before channels; one length of text only"
)
def CogVideoXTransformer3DModel() -> nn.Module:
    options = {
        "num_layers": 1,
        "time_embed_dim": 40,
        "text_embed_dim": TEXT_DIM,
        "sample_width": 20,
        "sample_height": 12,
        "sample_frames": 9,
    }
    return make(diffusers.CogVideoXTransformer3DModel, **ATTENTION, **LATENTS, **options, max_text_seq_length=7)


def rotated_frames(size: Size) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    corners = ((0, 0), (size.height, size.width))
    table = get_3d_rotary_pos_embed(HEAD_DIM, corners, (size.height, size.width), size.frames)
    return {**frames_first(size), "image_rotary_emb": table}


@configuration(JOINT_GROUP, rotated_frames, **CLIP, note="frames before channels; rotations are inputs")
def CogVideoXTransformer3DModel__rotary() -> nn.Module:
    options = {"num_layers": 1, "time_embed_dim": 40, "text_embed_dim": TEXT_DIM, "use_rotary_positional_embeddings": True}
    return make(diffusers.CogVideoXTransformer3DModel, **ATTENTION, **LATENTS, **options)


@configuration(JOINT_GROUP, rotated_frames, **CLIP, note="frames before channels; rotations are inputs")
def ConsisIDTransformer3DModel() -> nn.Module:
    options = {"num_layers": 1, "time_embed_dim": 40, "text_embed_dim": TEXT_DIM, "use_rotary_positional_embeddings": True}
    return make(diffusers.ConsisIDTransformer3DModel, **ATTENTION, **LATENTS, **options)


def easy_inputs(size: Size) -> dict[str, Any]:
    return {**video_and_text(size), "timestep_cond": None}


@configuration(JOINT_GROUP, easy_inputs, **CLIP)
def EasyAnimateTransformer3DModel() -> nn.Module:
    options = {"num_layers": 1, "mmdit_layers": 1, "time_embed_dim": 40, "text_embed_dim": TEXT_DIM, "patch_size": 2}
    return make(diffusers.EasyAnimateTransformer3DModel, **ATTENTION, **LATENTS, **options, add_noise_in_inpaint_model=True)


def hunyuan_inputs(size: Size) -> dict[str, Any]:
    given = {"encoder_attention_mask": text_mask(size), "pooled_projections": pooled(size)}
    return {**video_and_text(size), **given, "guidance": torch.full((size.batch,), 6.0)}


HUNYUAN: dict[str, Any] = {**ATTENTION, **LATENTS, "num_layers": 1, "num_refiner_layers": 1, "text_embed_dim": TEXT_DIM, "mlp_ratio": 2.0}
HUNYUAN |= {"rope_axes_dim": (4, 6, 6)}


@configuration(JOINT_GROUP, hunyuan_inputs, WITH_REFINER, **CLIP)
def HunyuanVideoTransformer3DModel() -> nn.Module:
    return make(diffusers.HunyuanVideoTransformer3DModel, **HUNYUAN, num_single_layers=1, pooled_projection_dim=POOLED_DIM)


@configuration(JOINT_GROUP, hunyuan_inputs, WITH_REFINER, **CLIP, note="the first frame, a given picture, has a modulation of its own")
def HunyuanVideoTransformer3DModel__image() -> nn.Module:
    more = {"num_single_layers": 1, "pooled_projection_dim": POOLED_DIM, "image_condition_type": "token_replace"}
    return make(diffusers.HunyuanVideoTransformer3DModel, **HUNYUAN, **more)


def framepack_inputs(size: Size) -> dict[str, Any]:
    """The frames that are made, and three runs of frames before them, each at a coarser grid."""
    clean, twice, four = (video(size._replace(frames=count)) for count in (2, 2, 4))
    return {
        **hunyuan_inputs(size),
        "image_embeds": text(size, 20, length=5, seed=6),
        "indices_latents": torch.arange(9, 9 + size.frames),
        "latents_clean": clean,
        "indices_latents_clean": torch.arange(7, 9),
        "latents_history_2x": twice,
        "indices_latents_history_2x": torch.arange(5, 7),
        "latents_history_4x": four,
        "indices_latents_history_4x": torch.arange(1, 5),
    }


@configuration(
    JOINT_GROUP,
    framepack_inputs,
    {"transformer_blocks.*": EITHER, "single_transformer_blocks.*": EITHER, "context_embedder*": TEXT},
    **CLIP,
    error="data",
    note="four grids of different fineness in one sequence; how many tokens of the text count is data",
)
def HunyuanVideoFramepackTransformer3DModel() -> nn.Module:
    more = {"num_single_layers": 1, "pooled_projection_dim": POOLED_DIM, "has_image_proj": True, "image_proj_dim": 20}
    return make(diffusers.HunyuanVideoFramepackTransformer3DModel, **HUNYUAN, **more, has_clean_x_embedder=True)


def hunyuan15_inputs(size: Size) -> dict[str, Any]:
    return {
        **video_and_text(size),
        "hidden_states": video(size, patch=1),
        "encoder_attention_mask": text_mask(size),
        "encoder_hidden_states_2": text(size, 20, length=size.text + 2, seed=5),
        "encoder_attention_mask_2": text_mask(size, length=size.text + 2),
        "image_embeds": torch.zeros(size.batch, 5, 22),
    }


@configuration(
    JOINT_GROUP,
    hunyuan15_inputs,
    {"transformer_blocks.*": REWRITE, "context_embedder*": TEXT},
    **CLIP,
    error="control flow",
    note="whether the picture's embedding is zero decides the control flow",
)
def HunyuanVideo15Transformer3DModel() -> nn.Module:
    more = {"text_embed_2_dim": 20, "image_embed_dim": 22, "target_size": 16, "task_type": "t2v", "patch_size": 1}
    return make(diffusers.HunyuanVideo15Transformer3DModel, **HUNYUAN, **more)


@configuration(JOINT_GROUP, lambda s: {**video_and_text(s), "encoder_attention_mask": text_mask(s)}, MAIN, **CLIP)
def MotifVideoTransformer3DModel() -> nn.Module:
    options = {**ATTENTION, **LATENTS, "num_layers": 1, "num_single_layers": 1, "text_embed_dim": TEXT_DIM, "rope_axes_dim": (4, 6, 6)}
    return make(diffusers.MotifVideoTransformer3DModel, **options)


@configuration(
    JOINT_GROUP,
    lambda s: {**video_and_text(s), "encoder_attention_mask": text_mask(s).bool()},
    {"transformer_blocks.*": "keep: one module runs several attentions", "time_embed*": TEXT},
    **CLIP,
    error="data",
    note="every sample's own number of text tokens, in a loop over the batch",
)
def MochiTransformer3DModel() -> nn.Module:
    options = {"num_layers": 1, "pooled_projection_dim": 16, "text_embed_dim": TEXT_DIM, "time_embed_dim": 32, "max_sequence_length": 7}
    return make(diffusers.MochiTransformer3DModel, **ATTENTION, **LATENTS, **options)


def cosmos3_inputs(size: Size) -> dict[str, Any]:
    """One sample: text tokens, then a video's; where each stands is an input."""
    whole, words = size.text + size.frames * size.tokens, size.text
    shape = (size.frames, size.height, size.width)
    place = torch.stack([axis.flatten() for axis in torch.meshgrid(*map(torch.arange, shape), indexing="ij")])
    here = torch.arange(words, whole)
    return tuples(
        input_ids=torch.arange(words),
        text_indexes=torch.arange(words),
        position_ids=torch.cat([torch.arange(words).expand(3, -1), place + words], 1),
        und_len=words,
        sequence_length=whole,
        vision_tokens=[normal(1, VIDEO, *shape)],
        vision_token_shapes=[shape],
        vision_sequence_indexes=here,
        vision_mse_loss_indexes=here,
        vision_timesteps=torch.full((len(here),), 500.0),
        vision_noisy_frame_indexes=[torch.arange(size.frames)],
    )


@configuration(JOINT_GROUP, cosmos3_inputs, **CLIP, stated=True, note="video queries over text and video keys; places are data")
def Cosmos3OmniTransformer() -> nn.Module:
    heads = {"head_dim": HEAD_DIM, "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": 1, "intermediate_size": 40}
    options = {"latent_channel": VIDEO, "latent_patch_size": 1, "patch_latent_dim": VIDEO, "num_hidden_layers": 1, "vocab_size": 40}
    return make(diffusers.Cosmos3OmniTransformer, **heads, **options, rope_axes_dim=[4, 2, 2])


def minimax_inputs(size: Size) -> dict[str, Any]:
    """Text, sound and video in one sequence; where each stands is an input."""
    words, sound, clip = size.text, 5, size.frames * size.tokens
    whole = words + sound + clip
    ids = torch.zeros(whole, 3)
    shape = (size.frames, size.height, size.width)
    ids[words + sound :] = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij"), -1).flatten(0, 2)
    tags = torch.tensor([1] * words + [2] * sound + [0] * clip)
    return tuples(
        hidden_states=normal(size.batch, clip, 4 * VIDEO),
        audio_hidden_states=normal(size.batch, sound, 6, seed=5),
        encoder_hidden_states=text(size),
        timestep=torch.tensor([0.7, 0.3]),
        timestep_indices=(tags == 2).long(),
        token_tags=tags,
        position_ids=ids,
        text_indices=torch.arange(words),
        audio_indices=torch.arange(words, words + sound),
        video_indices=torch.arange(words + sound, whole),
    )


@configuration(
    JOINT_GROUP,
    minimax_inputs,
    {"transformer_blocks.*": KEEP, "token_refiner*": TEXT},
    **CLIP,
    error="data|index",
    note="text, sound and video in one sequence; where each stands is data",
)
def MiniMaxH3Transformer3DModel() -> nn.Module:
    options = {"num_layers": 1, "num_refiner_layers": 1, "hidden_size": 40, "ffn_dim": 40, "in_channels": VIDEO, "audio_in_channels": 6}
    times = {"freq_dim": 32, "time_embed_hidden_dim": 40, "time_embed_dim": 20, "rope_freq_dim": 2, "text_dim": TEXT_DIM}
    return make(diffusers.MiniMaxH3Transformer3DModel, **ATTENTION, **options, **times)
