"""Tiny offline text-to-image pipelines with random weights; nothing is downloaded, and all can be saved and loaded.

Every 8x8 pixels become one token: an image of 32x48 is 24 tokens. PixArt maps every request to a resolution of about 256x256 pixels unless
`use_resolution_binning=False` is passed.
"""

import json
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

LATENT_CHANNELS, CLIP_DIM, T5_DIM = 4, 24, 40
SIZES: dict[str, Any] = {"num_layers": 2, "num_attention_heads": 3, "attention_head_dim": 16}
WIDTH = 48


def clip_tokenizer() -> CLIPTokenizer:
    letters = [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase + string.digits]
    vocabulary = {token: index for index, token in enumerate([*letters, "re", "red</w>", "<|startoftext|>", "<|endoftext|>"])}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(prefix + letter, -3.0) for prefix in ("", "▁") for letter in string.ascii_lowercase + string.digits]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save(str(Path(name) / "tokenizer.json"))
        return T5TokenizerFast.from_pretrained(name, model_max_length=512, extra_ids=0)


def clip_config(vocabulary: int) -> CLIPTextConfig:
    sizes = {"hidden_size": CLIP_DIM, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    return CLIPTextConfig(vocab_size=vocabulary, projection_dim=CLIP_DIM, max_position_embeddings=77, **sizes, **tokens)


def t5_encoder() -> T5EncoderModel:
    sizes = {"d_model": T5_DIM, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=128, **sizes)).eval()


def autoencoder(**options: Any) -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    sizes = {"block_out_channels": (8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": LATENT_CHANNELS}
    return AutoencoderKL(**blocks, **sizes, sample_size=32, **options).eval()


def quiet(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """No progress bars: neither of this pipeline's steps nor, in the whole process, of saving and loading."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sd3_pipeline() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    shape = {"sample_size": 16, "patch_size": 2, "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS, "pos_embed_max_size": 20}
    text = {"joint_attention_dim": T5_DIM, "caption_projection_dim": WIDTH, "pooled_projection_dim": 2 * CLIP_DIM}
    clip = clip_tokenizer()
    config = clip_config(len(clip))
    parts = {
        "transformer": SD3Transformer2DModel(**SIZES, **shape, **text).eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": autoencoder(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": CLIPTextModelWithProjection(config).eval(),
        "tokenizer": clip,
        "text_encoder_2": CLIPTextModelWithProjection(config).eval(),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_3": t5_encoder(),
        "tokenizer_3": t5_tokenizer(),
    }
    return quiet(StableDiffusion3Pipeline(**parts))


def pixart_pipeline() -> PixArtSigmaPipeline:
    torch.manual_seed(0)
    shape = {"sample_size": 32, "patch_size": 2, "in_channels": LATENT_CHANNELS, "out_channels": 2 * LATENT_CHANNELS}
    text = {"cross_attention_dim": WIDTH, "caption_channels": T5_DIM, "use_additional_conditions": False}
    parts = {
        "tokenizer": t5_tokenizer(),
        "text_encoder": t5_encoder(),
        "vae": autoencoder(scaling_factor=0.13),
        "transformer": PixArtTransformer2DModel(**SIZES, **shape, **text, norm_num_groups=4).eval(),
        "scheduler": DDIMScheduler(),  # the DPM solver raises a deprecation warning of NumPy
    }
    return quiet(PixArtSigmaPipeline(**parts))


def flux_pipeline() -> FluxPipeline:
    torch.manual_seed(0)
    shape = {"in_channels": 4 * LATENT_CHANNELS, "num_single_layers": 2, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True}
    text = {"joint_attention_dim": T5_DIM, "pooled_projection_dim": CLIP_DIM}
    clip = clip_tokenizer()
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": autoencoder(shift_factor=0.1, scaling_factor=0.36, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": CLIPTextModel(clip_config(len(clip))).eval(),
        "tokenizer": clip,
        "text_encoder_2": t5_encoder(),
        "tokenizer_2": t5_tokenizer(),
        "transformer": FluxTransformer2DModel(**SIZES, **shape, **text).eval(),
    }
    return quiet(FluxPipeline(**parts))


def unet_pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    clip = clip_tokenizer()
    shape = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64), "norm_num_groups": 8}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    unet = UNet2DConditionModel(**shape, **blocks, layers_per_block=1, cross_attention_dim=CLIP_DIM, attention_head_dim=8)
    parts = {
        "vae": autoencoder(scaling_factor=0.13),
        "text_encoder": CLIPTextModel(clip_config(len(clip))).eval(),
        "tokenizer": clip,
        "unet": unet.eval(),
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
        "safety_checker": None,
        "feature_extractor": None,
    }
    return quiet(StableDiffusionPipeline(**parts, requires_safety_checker=False))


PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {"sd3": sd3_pipeline, "pixart": pixart_pipeline, "flux": flux_pipeline}
