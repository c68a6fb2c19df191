"""Captions and images to what a transformer takes, through its pipeline's text encoders and VAE; and latents back to images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.adapters.family import Size, TextToImageFamily, known_classes, lookup_family, makes_videos
from edit_compile.adapters.hub_access import hub_access
from edit_compile.adapters.latents import decode, encode
from edit_compile.adapters.model_names import hub_id
from edit_compile.adapters.pipelines import PIPELINE_INDEX, dtype_kwarg, load_diffusers_pipeline
from edit_compile.demo import models as demo
from edit_compile.errors import DistillError

_MASK = "encoder_attention_mask"
_PER_TOKEN = ("encoder_hidden_states", _MASK)


def other_conditions(model: nn.Module, size: Size, batch: int) -> dict[str, Any]:
    """Return the conditions of a batch that do not depend on its captions.

    Args:
        size: height and width of the images in pixels.
        batch: number of images.

    Raises:
        DistillError: the model's family is not known.
    """
    return captioned_family(model).other_conditions(model, size, batch)


class PipelineEncoder:
    """The VAE and the text encoders of a pipeline, on a device.

    Latents are the mode of the VAE's distribution, and so a function of the image.

    Attributes:
        granularity: the sides of images must be multiples of it, in pixels.
    """

    def __init__(self, model: nn.Module, base: str, device: torch.device, dtype: torch.dtype, text_tokens: int | None) -> None:
        """
        Args:
            base: the pipeline's folder or hub id.
            dtype: of the encoders.
            text_tokens: the pipeline's `max_sequence_length`; None for its default.

        Raises:
            DistillError: the pipeline cannot be loaded, or its family is not known.
        """
        self.model, self.family = model, captioned_family(model)
        self.pipe = load_parts(base, dtype, None).to(device)
        self.options = {"device": device} | ({} if text_tokens is None else {"max_sequence_length": text_tokens})
        self.granularity = self.pipe.vae_scale_factor * self.family.latent_patch(model)

    def check(self, caption: str) -> None:
        """Accept any text."""

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Encode B captions: tensors (B, ...) on the CPU, by the name of the forward's argument."""
        conditions = self.family.encode_captions(self.pipe, list(captions), self.options)
        return {name: x.cpu() for name, x in conditions.items()}

    @torch.no_grad()
    def encode_images(self, images_B3HW: Tensor) -> Tensor:
        """Encode images in [-1, 1] to latents (B, C, h, w) on the CPU, in the model's scale."""
        return encode(self.pipe.vae, images_B3HW).cpu()

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to images in [0, 1], (B, 3, H, W) on the CPU."""
        return _decoded(self.pipe.vae, latents)

    def other_conditions(self, size: Size, batch: int) -> dict[str, Any]:
        """Return the conditions that do not depend on captions, for images of a size in pixels."""
        return self.family.other_conditions(self.model, size, batch)


class DemoEncoder:
    """The encoder of the demo models, which take images as they are and know a few words."""

    granularity = 2

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def check(self, caption: str) -> None:
        """Raise ValueError for a caption with unknown words, or too many."""
        demo.conditions(self.model, [caption])

    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Encode B captions: tensors (B, ...), by the name of the forward's argument."""
        conditions = demo.conditions(self.model, captions)
        return {name: x for name, x in conditions.items() if isinstance(x, Tensor)}

    def encode_images(self, images_B3HW: Tensor) -> Tensor:
        """Return the images."""
        return images_B3HW

    def decode(self, latents: Tensor) -> Tensor:
        """Bring images from [-1, 1] to [0, 1]."""
        return _to_unit_range(latents)

    def other_conditions(self, size: Size, batch: int) -> dict[str, Any]:
        """Return the conditions that do not depend on captions, for images of a size in pixels."""
        return other_conditions(self.model, size, batch)


def make_encoder(
    model: nn.Module, base: str | None, device: torch.device, dtype: torch.dtype, text_tokens: int | None
) -> PipelineEncoder | DemoEncoder:
    """Load the encoder of a model.

    Args:
        base: of the model, or of the model it was converted from: a demo model's name, or a pipeline's folder or hub id.
        text_tokens: the pipeline's `max_sequence_length`; None for its default.

    Raises:
        DistillError: the model makes videos, the pipeline is not known or cannot be loaded, or how captions reach the model is not known.
    """
    check_encoder(model, base)
    if base is None or base in demo.SOURCES:
        return DemoEncoder(model)
    return PipelineEncoder(model, base, device, dtype, text_tokens)


def check_encoder(model: nn.Module, base: str | None) -> None:
    """Raise DistillError if there can be no encoder for a model, whose weights may be missing."""
    if makes_videos(model):
        kind = "moving-shapes" if base in demo.SOURCES else "pipeline"
        raise DistillError(f"{base or type(model).__name__} makes videos, and these data are images; use data of kind {kind}")
    if base is None:
        raise DistillError("images and captions need the model's pipeline, which is not known; use data of kind cached")
    if base not in demo.SOURCES:
        captioned_family(model)
        _check_pipeline(base)


def make_decoder(base: str | None, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """Make a function from a model's latents to images in [0, 1]; a VAE is loaded when first needed. None if there is no pipeline."""
    if base in demo.SOURCES:
        return _to_unit_range
    if base is None or (Path(base).is_dir() and not (Path(base) / "vae").is_dir()):
        return None

    @cache
    def vae() -> Any:
        from diffusers import AutoModel

        repository, revision = (base, None) if Path(base).is_dir() else hub_id(base)
        with hub_access(base):
            return AutoModel.from_pretrained(repository, subfolder="vae", revision=revision, **dtype_kwarg(dtype)).to(device)

    return lambda latents: _decoded(vae(), latents)


@torch.no_grad()
def _decoded(vae: Any, latents: Tensor) -> Tensor:
    return _to_unit_range(decode(vae, latents).float().cpu())


def _to_unit_range(images: Tensor) -> Tensor:
    return (images / 2 + 0.5).clamp(0, 1)


def load_parts(base: str, dtype: torch.dtype, transformer: nn.Module | None) -> Any:
    """Load a pipeline with the given transformer instead of its own, or without any.

    Raises:
        DistillError: it cannot be loaded.
    """
    _check_pipeline(base)
    try:
        pipe = load_diffusers_pipeline(base, transformer=transformer, **dtype_kwarg(dtype))
    except Exception as error:  # a folder that is not a pipeline fails in many ways
        raise DistillError(f"the VAE and text encoders of {base} cannot be loaded: {error or type(error).__name__}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_pipeline(base: str) -> None:
    if Path(base).is_dir() and not (Path(base) / PIPELINE_INDEX).is_file():
        raise DistillError(
            f"{base} is a transformer without its pipeline: images and captions need the VAE and text encoders beside it; "
            "give the pipeline as model:, or use data of kind cached"
        )


def trimmed(conditions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut one caption's conditions (without batch dimension) where a mask hides padding from the model.

    Padding that the model attends to (SD3, FLUX) stays, since the output depends on it. A caption that is nothing but padding keeps it.
    """
    if _MASK not in conditions or not conditions[_MASK].any():
        return conditions
    length = int(conditions[_MASK].nonzero().max()) + 1
    return {name: x[:length].contiguous() if name in _PER_TOKEN else x for name, x in conditions.items()}


def stacked(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack captions' conditions into a batch (B, ...); those that were trimmed are padded with zeros to the longest."""
    batch = {}
    for name in rows[0]:
        columns = [row[name] for row in rows]
        batch[name] = nn.utils.rnn.pad_sequence(columns, batch_first=True) if name in _PER_TOKEN else torch.stack(columns)
    return batch


def captioned_family(model: nn.Module) -> TextToImageFamily:
    """Return the family that says how captions reach a model.

    Raises:
        DistillError: it is not known.
    """
    family = lookup_family(model)
    if isinstance(family, TextToImageFamily):
        return family
    known = known_classes(TextToImageFamily)
    raise DistillError(f"how captions reach a {type(model).__name__} is not known (known: {known}); pass distill(source=...)")
