"""Example inputs for the model families users ask for first. Everything else brings its own, or records them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.adapters.family import of_family
from edit_compile.demo.text import TEXT_LENGTH as DEMO_TEXT
from edit_compile.errors import GridError, NoExampleInputsError

VAE_SCALE, RGB = 8, 3
USUAL_PIXELS = (1024, 2048, 4096)


@dataclass(frozen=True)
class _Sizes:
    """Of the tensors to make: rows and columns count image tokens, text counts text tokens."""

    batch: int
    text: int
    rows: int
    columns: int
    device: torch.device
    dtype: torch.dtype

    def floats(self, *shape: int) -> Tensor:
        make = torch.empty if self.device.type == "meta" else torch.randn
        return make((self.batch, *shape), dtype=self.dtype, device=self.device)

    def integers(self) -> Tensor:
        return torch.zeros(self.batch, dtype=torch.int64, device=self.device)

    def picture(self, model: Any) -> Tensor:
        patch = model.config.patch_size
        return self.floats(model.config.in_channels, patch * self.rows, patch * self.columns)


def _pixart(model: Any, sizes: _Sizes) -> dict[str, Any]:
    use_added = getattr(model, "use_additional_conditions", False)
    added = {"resolution": sizes.floats(2), "aspect_ratio": sizes.floats(1)}
    return {
        "hidden_states": sizes.picture(model),
        "encoder_hidden_states": sizes.floats(sizes.text, model.config.caption_channels),
        "timestep": sizes.integers(),
        "added_cond_kwargs": added if use_added else {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": torch.ones_like(sizes.floats(sizes.text)),
        "return_dict": False,
    }


def _sd3(model: Any, sizes: _Sizes) -> dict[str, Any]:
    return {
        "hidden_states": sizes.picture(model),
        "encoder_hidden_states": sizes.floats(sizes.text, model.config.joint_attention_dim),
        "pooled_projections": sizes.floats(model.config.pooled_projection_dim),
        "timestep": sizes.floats(),
        "return_dict": False,
    }


def _flux(model: Any, sizes: _Sizes) -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(float(sizes.rows)), torch.arange(float(sizes.columns)), indexing="ij")
    inputs = {
        "hidden_states": sizes.floats(rows.numel(), model.config.in_channels),
        "encoder_hidden_states": sizes.floats(sizes.text, model.config.joint_attention_dim),
        "pooled_projections": sizes.floats(model.config.pooled_projection_dim),
        "timestep": sizes.floats(),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1),
        "txt_ids": torch.zeros(sizes.text, 3),
        "return_dict": False,
    }
    return inputs | ({"guidance": sizes.floats()} if model.config.guidance_embeds else {})


def _dit(model: Any, sizes: _Sizes) -> dict[str, Any]:
    return {
        "hidden_states": sizes.picture(model),
        "timestep": sizes.integers(),
        "class_labels": sizes.integers(),
        "return_dict": False,
    }


def _vit(model: Any, sizes: _Sizes) -> dict[str, Any]:
    patch = model.patch_embed.patch_size
    return {"x": sizes.floats(model.patch_embed.proj.in_channels, patch[0] * sizes.rows, patch[1] * sizes.columns)}


def _no_limit(model: Any, rows: int, columns: int) -> str | None:
    return None


def _position_limit(model: Any, rows: int, columns: int) -> str | None:
    most = model.config.pos_embed_max_size
    if max(rows, columns) <= most:
        return None
    return f"its positions (pos_embed_max_size={most}) end at {most * pixels_per_token(model)} px"


def _square(model: Any, rows: int, columns: int) -> str | None:
    return None if rows == columns else "it draws squares only"


def _own_size(model: Any, rows: int, columns: int) -> str | None:
    height, width = model.patch_embed.img_size
    patch = model.patch_embed.patch_size
    return None if (rows, columns) == (height // patch[0], width // patch[1]) else f"it was built for {height} x {width} px"


def _usual(model: Any) -> tuple[tuple[int, int], ...]:
    """What a latent model is used at; a model that draws pixels itself is taken at its own size, twice and four times it."""
    if model.config.in_channels == RGB:
        return tuple((model.config.sample_size * n,) * 2 for n in (1, 2, 4))
    return tuple((side, side) for side in USUAL_PIXELS)


@dataclass(frozen=True)
class _Family:
    """A model family.

    Attributes:
        make: keyword arguments of one forward.
        text: how many text tokens its pipeline passes.
        pixels_per_token: of the finished picture, each way.
        limit: why a grid of image tokens is impossible, or None.
        usual: sizes in pixels (height, width) that its users care for.
        example: rows and columns to capture it with; all sizes differ and none is 1, since equal sizes would merge in the graph;
            image and text tokens together must not be as many as the model has channels.
    """

    make: Callable[[Any, _Sizes], dict[str, Any]]
    text: int = 0
    pixels_per_token: Callable[[Any], int] = lambda model: model.config.patch_size * (1 if model.config.in_channels == RGB else VAE_SCALE)
    limit: Callable[[Any, int, int], str | None] = _no_limit
    usual: Callable[[Any], tuple[tuple[int, int], ...]] = _usual
    example: Callable[[Any], tuple[int, int]] = lambda model: (10, 14)


_FAMILIES: dict[str, _Family] = {
    "PixArtTransformer2DModel": _Family(_pixart, 300),
    "SD3Transformer2DModel": _Family(_sd3, 77 + 256, limit=_position_limit),
    "FluxTransformer2DModel": _Family(_flux, 512, lambda model: 2 * VAE_SCALE),
    "DiTTransformer2DModel": _Family(_dit, limit=_square, example=lambda model: (model.config.sample_size // model.config.patch_size,) * 2),
    "VisionTransformer": _Family(
        _vit,
        pixels_per_token=lambda model: model.patch_embed.patch_size[0],
        limit=_own_size,
        usual=lambda model: (model.patch_embed.img_size,),
        example=lambda model: model.patch_embed.grid_size,
    ),
}


def _family(model: nn.Module) -> _Family:
    family = of_family(model, _FAMILIES)
    if family is not None:
        return family
    raise NoExampleInputsError(
        f"no example inputs are known for {type(model).__name__} (known: {', '.join(_FAMILIES)}); pass "
        "example_inputs=dict(...), keyword arguments of one forward, or record them: edit_compile.record(pipe, prompt=...)"
    )


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments of one forward, small, on the meta device in bfloat16 (position ids are real).

    Raises:
        NoExampleInputsError: the model's family has no adapter.
    """
    family = _family(model)
    return family.make(model, _Sizes(2, 13, *family.example(model), torch.device("meta"), torch.bfloat16))


@dataclass(frozen=True)
class PictureInputs:
    """One forward for a picture of given size.

    Attributes:
        inputs: keyword arguments of the forward.
        grid: (rows, columns) of image tokens.
        text: number of text tokens.
    """

    inputs: dict[str, Any]
    grid: tuple[int, int]
    text: int


def picture_inputs(
    model: nn.Module,
    height: int,
    width: int,
    *,
    batch: int = 1,
    text: int | None = None,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.bfloat16,
) -> PictureInputs:
    """The inputs for a picture of height x width pixels: random, or empty on the meta device.

    Args:
        text: number of text tokens; default: as many as the model's pipeline passes.

    Raises:
        GridError: the model cannot draw this size; says why.
        NoExampleInputsError: the model's family has no adapter.
    """
    family, step = _family(model), pixels_per_token(model)
    if min(height, width) < step or height % step or width % step:
        raise GridError(
            f"{type(model).__name__} cannot draw {height} x {width} px: both must be multiples of {step}, the pixels of a token"
        )
    rows, columns = height // step, width // step
    reason = family.limit(model, rows, columns)
    if reason is not None:
        raise GridError(f"{type(model).__name__} cannot draw {height} x {width} px: {reason}")
    tokens = text if text is not None else _usual_text(family, model)
    sizes = _Sizes(batch, tokens, rows, columns, torch.device(device), dtype)
    return PictureInputs(family.make(model, sizes), (rows, columns), tokens)


def _usual_text(family: _Family, model: Any) -> int:
    draws_pixels = hasattr(model, "config") and model.config.in_channels == RGB
    return DEMO_TEXT if family.text and draws_pixels else family.text


def pixels_per_token(model: nn.Module) -> int:
    """How many pixels of the finished picture an image token spans, each way."""
    return _family(model).pixels_per_token(model)


def usual_sizes(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """The picture sizes (height, width) in pixels that the model's users care for; not all need be possible."""
    return _family(model).usual(model)
