"""One call of a diffusion transformer, whatever its family: noisy pictures and timesteps in, prediction out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.adapters.family import of_family
from edit_compile.adapters.inputs import picture_inputs
from edit_compile.errors import NoExampleInputsError

Denoise = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Any]], Tensor]


def _sd3(model: Any, x_BCHW: Tensor, times_B: Tensor, conditions: Mapping[str, Any]) -> Tensor:
    return model(hidden_states=x_BCHW, timestep=times_B, return_dict=False, **conditions)[0]


def _without_variance(model: Any, x_BCHW: Tensor, times_B: Tensor, conditions: Mapping[str, Any]) -> Tensor:
    """PixArt and DiT may predict the variance in further channels, which distillation leaves out."""
    return _sd3(model, x_BCHW, times_B, conditions)[:, : x_BCHW.shape[1]]


def _flux(model: Any, x_BCHW: Tensor, times_B: Tensor, conditions: Mapping[str, Any]) -> Tensor:
    """FLUX takes 2 x 2 latents as one token, position ids, and timesteps in [0, 1]."""
    h, w = x_BCHW.shape[2:]
    rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(x_BCHW)
    text_ids = torch.zeros(conditions["encoder_hidden_states"].shape[1], 3).to(x_BCHW)
    times = times_B / 1000
    y = model(hidden_states=_packed(x_BCHW), timestep=times, img_ids=ids, txt_ids=text_ids, return_dict=False, **conditions)[0]
    return _unpacked(y, (h // 2, w // 2))


def _packed(x_BCHW: Tensor) -> Tensor:
    b, c, h, w = x_BCHW.shape
    return x_BCHW.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def _unpacked(tokens_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
    (b, _, c), (h, w) = tokens_BNC.shape, grid
    return tokens_BNC.view(b, h, w, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, 2 * h, 2 * w)


_FAMILIES: dict[str, Denoise] = {
    "PixArtTransformer2DModel": _without_variance,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "DiTTransformer2DModel": _without_variance,
}
_NO_CONDITIONS = ("hidden_states", "timestep", "img_ids", "txt_ids", "return_dict")  # what `denoise` passes itself


def denoise(model: nn.Module, x_BCHW: Tensor, times_B: Tensor, conditions: Mapping[str, Any]) -> Tensor:
    """The model's prediction for noisy pictures, (B, C, H, W).

    Args:
        model: a transformer of a family known here, or a copy of one that was converted or wrapped.
        x_BCHW: in the model's latent space.
        times_B: timesteps in [0, 1000).
        conditions: the forward's keyword arguments that carry the captions.

    Raises:
        NoExampleInputsError: the family has no adapter.
    """
    return _call_of(getattr(model, "module", model))(model, x_BCHW, times_B, conditions)


def random_batch(
    model: nn.Module, height: int, width: int, size: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, dict[str, Any]]:
    """What `denoise` takes for pictures of height x width pixels, random (on the meta device, empty): x_BCHW and conditions.

    Raises:
        GridError: the model cannot draw this size; says why.
        NoExampleInputsError: the model's family has no adapter.
    """
    call = _call_of(model)
    made = picture_inputs(model, height, width, batch=size, device=device, dtype=dtype)
    x = made.inputs["hidden_states"]
    conditions = {name: value for name, value in made.inputs.items() if name not in _NO_CONDITIONS}
    return _unpacked(x, made.grid) if call is _flux else x, conditions


def _call_of(model: nn.Module) -> Denoise:
    call = of_family(model, _FAMILIES)
    if call is not None:
        return call
    raise NoExampleInputsError(
        f"how to call a {type(model).__name__} is not known (known: {', '.join(_FAMILIES)}); "
        "pass denoise=, a function of model, noisy pictures, timesteps and conditions"
    )
