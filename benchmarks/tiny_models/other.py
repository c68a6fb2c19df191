"""Transformers of diffusers that make no images: sound, embeddings, proteins; and temporal blocks."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from tiny_models.base import (
    ATTENTION,
    HEAD_DIM,
    HEADS,
    KEEP,
    REWRITE,
    SIZES,
    TEXT_DIM,
    VIDEO,
    WIDTH,
    Size,
    configuration,
    latents,
    make,
    normal,
    steps,
    text,
    text_mask,
    tuples,
)

GROUP = "No images: sound, embeddings, time alone"
SOUND = {"*": "keep: no image tokens|one-dimensional|cross-attention|causal"}
# (batch, length, channels) without positions could be packed latents of an image: rewritten, and the caller has to state the grid
PACKED = "could be packed latents of an image: nothing tells that it is sound"
NO_PICTURE = "no image|one-dimensional|sequence|grid"


def sound(size: Size, channels: int = VIDEO, last: bool = True) -> torch.Tensor:
    """(batch, length, channels), or channels first, of a length that is no product of the image's sizes."""
    wave = normal(size.batch, 2 * size.tokens + 2 * size.frames, channels)
    return wave if last else wave.transpose(1, 2).contiguous()


def ace_inputs(size: Size) -> dict[str, Any]:
    given = {"encoder_hidden_states": text(size), "context_latents": sound(size, 2 * VIDEO)}
    return tuples(hidden_states=sound(size), timestep=steps(size, 1.0), timestep_r=steps(size, 0.5), **given)


@configuration(GROUP, ace_inputs, SOUND, error=NO_PICTURE)
def AceStepTransformer1DModel() -> nn.Module:
    heads = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": 1, "head_dim": HEAD_DIM, "intermediate_size": 40}
    options = {"num_hidden_layers": 1, "in_channels": 3 * VIDEO, "audio_acoustic_hidden_dim": VIDEO, "encoder_hidden_size": TEXT_DIM}
    return make(diffusers.AceStepTransformer1DModel, **heads, **options, sliding_window=16)


def longcat_inputs(size: Size) -> dict[str, Any]:
    given = {"encoder_hidden_states": text(size), "encoder_attention_mask": text_mask(size).bool(), "timestep": steps(size, 1.0)}
    wave = normal(size.batch, size.tokens, VIDEO)
    return tuples(hidden_states=wave, **given, latent_cond=normal(size.batch, size.tokens, VIDEO, seed=4))


@configuration(GROUP, longcat_inputs, {"*self_attn": REWRITE, "*": "keep: no image|cross-attention"}, stated=True, note=PACKED)
def LongCatAudioDiTTransformer() -> nn.Module:
    options = {"dit_dim": WIDTH, "dit_depth": 1, "dit_heads": HEADS, "dit_text_dim": TEXT_DIM, "latent_dim": VIDEO}
    return make(diffusers.LongCatAudioDiTTransformer, **options)


def music_inputs(size: Size) -> dict[str, Any]:
    wave = sound(size, last=False)
    condition = normal(size.batch, wave.shape[2], 20, seed=3)
    return tuples(hidden_states=wave, timestep=steps(size, 1.0), encoder_hidden_states=condition)


@configuration(GROUP, music_inputs, SOUND, error=NO_PICTURE)
def MiniMaxMusic3Transformer1DModel() -> nn.Module:
    options = {"in_channels": VIDEO, "condition_dim": 20, "num_layers": 1, "ff_inner_dim": 40, "rotary_dim": 8}
    return make(diffusers.MiniMaxMusic3Transformer1DModel, **ATTENTION, **options, fourier_embedding_dim=32)


def depth_inputs(size: Size) -> dict[str, Any]:
    return {"hidden_states": normal(size.batch, 4, WIDTH)}


def stable_inputs(size: Size) -> dict[str, Any]:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    wave = sound(size, last=False)
    table = get_1d_rotary_pos_embed(HEAD_DIM // 2, wave.shape[2] + 1, use_real=True, repeat_interleave_real=False)
    given = {"encoder_hidden_states": text(size), "global_hidden_states": normal(size.batch, 1, 20, seed=5), "rotary_embedding": table}
    return tuples(hidden_states=wave, timestep=steps(size, 1.0), **given)


@configuration(GROUP, stable_inputs, SOUND, error=NO_PICTURE)
def StableAudioDiTModel() -> nn.Module:
    cross = {"num_key_value_attention_heads": HEADS, "cross_attention_dim": WIDTH, "cross_attention_input_dim": TEXT_DIM}
    options = {"in_channels": VIDEO, "out_channels": VIDEO, "num_layers": 1, "global_states_input_dim": 20, "time_proj_dim": 32}
    return make(diffusers.StableAudioDiTModel, **ATTENTION, **cross, **options, sample_size=40)


def prior_inputs(size: Size) -> dict[str, Any]:
    embedding = normal(size.batch, 28)
    given = {"proj_embedding": normal(size.batch, 28, seed=4), "encoder_hidden_states": text(size._replace(text=7), 28)}
    return tuples(hidden_states=embedding, timestep=steps(size), **given)


@configuration(GROUP, prior_inputs, {"*": "keep: no image tokens"}, error=NO_PICTURE, note="an embedding beside text")
def PriorTransformer() -> nn.Module:
    return make(diffusers.PriorTransformer, **ATTENTION, num_layers=1, embedding_dim=28, num_embeddings=7, additional_embeddings=4)


def temporal_inputs(size: Size) -> dict[str, Any]:
    return tuples(hidden_states=latents(size._replace(batch=size.batch * size.frames), WIDTH, patch=1), num_frames=size.frames)


@configuration(GROUP, temporal_inputs, {"*": KEEP}, note="attention along time at every place")
def TransformerTemporalModel() -> nn.Module:
    return make(diffusers.TransformerTemporalModel, **ATTENTION, in_channels=WIDTH, num_layers=1, norm_num_groups=4)


@configuration(
    GROUP,
    lambda s: {
        "decoder_input_tokens": normal(s.batch, s.tokens, VIDEO),
        "decoder_noise_time": steps(s, 1.0),
        "encodings_and_masks": [(text(s, WIDTH), torch.ones(s.batch, s.text))],
    },
    {"*layer.0.attention": REWRITE, "*": "keep: cross-attention"},
    stated=True,
    sizes=(SIZES[0], SIZES[1]._replace(height=10, width=6)),
    note=f"a spectrogram of fixed length; {PACKED}",
)
def T5FilmDecoder() -> nn.Module:
    options = {"input_dims": VIDEO, "targets_length": SIZES[0].tokens, "d_model": WIDTH, "d_kv": HEAD_DIM, "d_ff": 40}
    return make(diffusers.T5FilmDecoder, **options, num_layers=1, num_heads=HEADS)


@configuration(
    GROUP, lambda s: {"inputs_embeds": normal(s.batch, s.text, WIDTH)}, SOUND, error=NO_PICTURE, note="a language model of codes"
)
def MiniMaxMusic3RVQDepthDecoder() -> nn.Module:
    options = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 40, "audio_vocab_size": 20, "num_codebooks": 3}
    return make(diffusers.MiniMaxMusic3RVQDepthDecoder, **options, num_layers=1)


def stable3_inputs(size: Size) -> dict[str, Any]:
    context = {"encoder_hidden_states": text(size), "encoder_attention_mask": text_mask(size).bool()}
    given = {"global_hidden_states": normal(size.batch, 20, seed=5), "local_add_cond": None}
    return tuples(hidden_states=sound(size, last=False), timestep=steps(size, 1.0), **context, **given)


@configuration(GROUP, stable3_inputs, SOUND, error=NO_PICTURE)
def StableAudio3DiTModel() -> nn.Module:
    options = {"io_channels": VIDEO, "embed_dim": WIDTH, "depth": 1, "num_heads": HEADS, "cond_token_dim": TEXT_DIM}
    more = {"global_cond_dim": 20, "local_add_cond_dim": 9, "timestep_features_dim": 32, "num_memory_tokens": 3}
    return make(diffusers.StableAudio3DiTModel, **options, **more)
