"""A CLIP model of transformers, as torchmetrics calls it and as a network whose features a Frechet distance compares."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.errors import ConfigError, first_line

DEFAULT = "openai/clip-vit-large-patch14"
_CONFIGS = ("config.json", "preprocessor_config.json")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def missing(name: str) -> str | None:
    """Say what to fetch and where to put it before a CLIP model can be loaded without a network; None if all is there."""
    folder = Path(name)
    if folder.is_dir():
        lacking = [file for file in _CONFIGS if not (folder / file).is_file()]
        lacking += [] if any((folder / file).is_file() for file in _WEIGHTS) else [_WEIGHTS[0]]
        return f"{', '.join(lacking)} of a CLIP model into {folder}" if lacking else None
    if _cached(name, _WEIGHTS) and all(_cached(name, (file,)) for file in _CONFIGS):
        return None
    from huggingface_hub.constants import HF_HUB_CACHE

    return f"{name} into the hub's cache, {HF_HUB_CACHE}, with `hf download {name}`, or another copy into a folder for --clip"


def _cached(name: str, files: tuple[str, ...]) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
    except HFValidationError:
        raise ConfigError(f"--clip {name}: neither a folder nor a hub id") from None


class Clip(nn.Module):
    """A CLIP model with its processor. As a network of images it gives projected embeddings (B, D) of images (B, 3, H, W) of uint8.

    Attributes:
        num_features: D.
        sides: what images are resized to, in words.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        super().__init__()
        quiet = logging.getLogger("transformers")
        level = quiet.level
        quiet.setLevel(logging.ERROR)
        try:
            self.model: Any = CLIPModel.from_pretrained(name, local_files_only=True).eval().requires_grad_(False)
            self.images: Any = CLIPImageProcessor.from_pretrained(name, local_files_only=True)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--clip {name} cannot be loaded as a CLIP model: {first_line(error)}") from error
        finally:
            quiet.setLevel(level)
        self.config, self.num_features = self.model.config, int(self.model.config.projection_dim)
        self.sides = f"bicubic to {self.model.config.vision_config.image_size} px by CLIP's processor"

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        pixels = self.images(images=[image.cpu() for image in images], return_tensors="pt")["pixel_values"]
        return self.get_image_features(pixels.to(self.model.device))

    def get_image_features(self, pixels: Tensor) -> Tensor:
        """Embed processed images, (B, D)."""
        return _tensor(self.model.get_image_features(pixels))

    def get_text_features(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Embed captions, (B, D)."""
        return _tensor(self.model.get_text_features(tokens, mask))

    def processor(self, text: Any = None, images: Any = None, **options: Any) -> Any:
        """Process images, or captions, cut to the length that the model takes."""
        if images is not None:
            return self.images(images=images, return_tensors="pt")
        length = self.model.config.text_config.max_position_embeddings
        return self.tokenizer(text, truncation=True, max_length=length, **options)


def _tensor(output: Any) -> Tensor:
    """Take the embedding out of the object in which transformers 5 returns it."""
    embedding: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return embedding
