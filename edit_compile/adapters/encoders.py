"""Pictures and captions to what a transformer takes: through its pipeline's VAE and text encoders, by family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.adapters.family import of_family
from edit_compile.adapters.pipelines import weights_in
from edit_compile.demo import models as demo
from edit_compile.demo import text as demo_text
from edit_compile.errors import DistillError

_GUIDANCE = 3.5  # what models with distilled guidance are told; the default of FLUX's pipeline
_TOKEN_WISE = ("encoder_hidden_states", "encoder_attention_mask")
_MASK = "encoder_attention_mask"


def _nothing(model: Any, shape: tuple[int, int], size: int) -> dict[str, Any]:
    return {}


def _sd3_captions(pipe: Any, captions: list[str], options: dict[str, Any]) -> dict[str, Tensor]:
    tokens, _, pooled, _ = pipe.encode_prompt(captions, None, None, do_classifier_free_guidance=False, **options)
    return {"encoder_hidden_states": tokens, "pooled_projections": pooled}


def _pixart_captions(pipe: Any, captions: list[str], options: dict[str, Any]) -> dict[str, Tensor]:
    tokens, mask, _, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, **options)
    return {"encoder_hidden_states": tokens, "encoder_attention_mask": mask.float()}


def _pixart_others(model: Any, shape: tuple[int, int], size: int) -> dict[str, Any]:
    if not getattr(model, "use_additional_conditions", False):
        return {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    height, width = shape
    return {
        "added_cond_kwargs": {
            "resolution": torch.tensor([[height, width]]).float().repeat(size, 1),
            "aspect_ratio": torch.full((size, 1), height / width),
        }
    }


def _flux_captions(pipe: Any, captions: list[str], options: dict[str, Any]) -> dict[str, Tensor]:
    tokens, pooled, _ = pipe.encode_prompt(captions, **options)
    return {"encoder_hidden_states": tokens, "pooled_projections": pooled}


def _flux_others(model: Any, shape: tuple[int, int], size: int) -> dict[str, Any]:
    return {"guidance": torch.full((size,), _GUIDANCE)} if model.config.guidance_embeds else {}


@dataclass(frozen=True)
class _Family:
    """How a family's pipeline is used. `patch`: of latents to tokens, or None for the transformer's own."""

    captions: Callable[[Any, list[str], dict[str, Any]], dict[str, Tensor]]
    others: Callable[[Any, tuple[int, int], int], dict[str, Any]]
    patch: int | None = None


_FAMILIES = {
    "SD3Transformer2DModel": _Family(_sd3_captions, _nothing),
    "PixArtTransformer2DModel": _Family(_pixart_captions, _pixart_others),
    "FluxTransformer2DModel": _Family(_flux_captions, _flux_others, patch=2),
}


def _family(model: nn.Module) -> _Family:
    family = of_family(model, _FAMILIES)
    if family is not None:
        return family
    raise DistillError(
        f"how captions reach a {type(model).__name__} is not known (known: {', '.join(_FAMILIES)}); pass distill(source=...)"
    )


def other_conditions(model: nn.Module, shape: tuple[int, int], size: int) -> dict[str, Any]:
    """The conditions of a batch that do not depend on its captions.

    Args:
        shape: height and width of the pictures in pixels.
        size: pictures in the batch.
    """
    return _family(model).others(model, shape, size)


class PipelineEncoder:
    """The VAE and the text encoders of a pipeline, on a device.

    Latents are the mode of the VAE's distribution: so they are a function of the picture.

    Args:
        base: the pipeline's folder or hub id.
        dtype: of the encoders.
        text_tokens: the pipeline's `max_sequence_length`; None for its default.

    Raises:
        DistillError: the pipeline cannot be loaded, or its family is not known.
    """

    def __init__(self, model: nn.Module, base: str, device: torch.device, dtype: torch.dtype, text_tokens: int | None) -> None:
        self.model, self.family = model, _family(model)
        self.pipe = load_parts(base, dtype, None).to(device)
        self.options = {"device": device} | ({} if text_tokens is None else {"max_sequence_length": text_tokens})
        self.granularity = self.pipe.vae_scale_factor * (self.family.patch or getattr(model.config, "patch_size", 1))

    def check(self, caption: str) -> None:
        """Any text can be encoded."""

    @torch.no_grad()
    def captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        found = self.family.captions(self.pipe, list(captions), self.options)
        return {name: x.cpu() for name, x in found.items()}

    @torch.no_grad()
    def pictures(self, pictures_B3HW: Tensor) -> Tensor:
        vae = self.pipe.vae
        encoded = vae.encode(pictures_B3HW.to(vae.device, vae.dtype))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        shift, scale = _scale(vae)
        return ((latents - shift) * scale).cpu()

    def pixels(self, latents: Tensor) -> Tensor:
        return _decoded(self.pipe.vae, latents)

    def others(self, shape: tuple[int, int], size: int) -> dict[str, Any]:
        return self.family.others(self.model, shape, size)


class DemoEncoder:
    """The demo models take pictures as they are, and know a few words."""

    granularity = 2

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def check(self, caption: str) -> None:
        demo_text.encode([caption])

    def captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        conditions = demo.conditions(self.model, captions)
        return {name: x for name, x in conditions.items() if isinstance(x, Tensor)}

    def pictures(self, pictures_B3HW: Tensor) -> Tensor:
        return pictures_B3HW

    def pixels(self, latents: Tensor) -> Tensor:
        return _in_range(latents)

    def others(self, shape: tuple[int, int], size: int) -> dict[str, Any]:
        return other_conditions(self.model, shape, size)


def make_encoder(
    model: nn.Module, base: str | None, device: torch.device, dtype: torch.dtype, text_tokens: int | None
) -> PipelineEncoder | DemoEncoder:
    """The encoder of a model that is, or whose base is, at `base`: a demo model's name, a pipeline's folder or hub id.

    Raises:
        DistillError: there is none.
    """
    if base in demo.SOURCES:
        return DemoEncoder(model)
    if base is None:
        raise DistillError("pictures and captions need the model's pipeline, which is not known; use data of kind cached")
    return PipelineEncoder(model, base, device, dtype, text_tokens)


def make_decoder(base: str | None, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """What makes pictures in [0, 1] of a model's latents; a VAE is loaded when it is first needed. None without a pipeline."""
    if base in demo.SOURCES:
        return _in_range
    if base is None or (Path(base).is_dir() and not (Path(base) / "vae").is_dir()):
        return None

    @cache
    def vae() -> Any:
        from diffusers import AutoModel

        return AutoModel.from_pretrained(base, subfolder="vae", **weights_in(dtype)).to(device)

    return lambda latents: _decoded(vae(), latents)


def _scale(vae: Any) -> tuple[float, float]:
    """Latents of the model are (VAE's - shift) * scale."""
    return getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor


@torch.no_grad()
def _decoded(vae: Any, latents: Tensor) -> Tensor:
    shift, scale = _scale(vae)
    return _in_range(vae.decode(latents.to(vae.device, vae.dtype) / scale + shift, return_dict=False)[0].float().cpu())


def _in_range(pictures: Tensor) -> Tensor:
    return (pictures / 2 + 0.5).clamp(0, 1)


def load_parts(base: str, dtype: torch.dtype, transformer: nn.Module | None) -> Any:
    """A pipeline with the given transformer instead of its own, or without any.

    Raises:
        DistillError: it cannot be loaded.
    """
    from diffusers import DiffusionPipeline

    if Path(base).is_dir() and not (Path(base) / "model_index.json").is_file():
        raise DistillError(
            f"{base} is a transformer without its pipeline: pictures and captions need the VAE and text encoders beside it; "
            "give the pipeline as model:, or use data of kind cached"
        )
    try:
        pipe = DiffusionPipeline.from_pretrained(base, transformer=transformer, **weights_in(dtype))
    except Exception as error:  # a folder that is no pipeline fails in many ways
        raise DistillError(f"the VAE and text encoders of {base} cannot be loaded: {error or type(error).__name__}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def trimmed(conditions: dict[str, Tensor]) -> dict[str, Tensor]:
    """One caption's conditions (no batch dimension) without the padding that a mask hides from the model.

    Padding that the model attends to (SD3, FLUX) stays: without it its output would be another. So does the padding of a
    caption that is nothing else.
    """
    if _MASK not in conditions or not conditions[_MASK].any():
        return conditions
    length = int(conditions[_MASK].nonzero().max()) + 1
    return {name: x[:length].contiguous() if name in _TOKEN_WISE else x for name, x in conditions.items()}


def stacked(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Captions' conditions as one batch; those that were trimmed are padded with zeros to the longest."""
    found = {}
    for name in rows[0]:
        columns = [row[name] for row in rows]
        found[name] = nn.utils.rnn.pad_sequence(columns, batch_first=True) if name in _TOKEN_WISE else torch.stack(columns)
    return found
