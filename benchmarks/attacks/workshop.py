"""A tiny model, images, recipes and a checkpoint, for all trials of a process."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from torch import Tensor, nn

import edit_compile as ec

SMALL = {"sample_size": 12, "patch_size": 2, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 24, "num_layers": 2}
NARROW = {
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 24,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
}
RUN: dict[str, Any] = {
    "prediction": "rectified-flow",
    "data": {"kind": "random"},
    "layerwise": {"steps": 4, "global_batch_size": 2},
    "stages": [{"resolution": [64, 96], "steps": 6, "global_batch_size": 2}],
    "validation": {"samples": 2, "batch_size": 2, "timestep_bins": 1},
    "samples": {"count": 1, "steps": 1},
    "save_every": 2,
    "keep_last": 2,
    "log_every": 1,
    "trackers": [],
}


@cache
def workshop() -> Path:
    """Make a folder with a tiny model, captioned images, and recipes, for all trials of this process."""
    folder = Path(tempfile.mkdtemp(prefix="robustness-"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        diffusers.SD3Transformer2DModel(**SMALL, **NARROW).eval().save_pretrained(folder / "model")
    (folder / "images").mkdir()
    for number in range(8):
        shade = torch.full((32, 32, 3), 20 * number, dtype=torch.uint8).numpy()
        _image(shade).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text("a red circle")
    (folder / "run.yaml").write_text(yaml.safe_dump({**RUN, "model": str(folder / "model")}))
    images = {"kind": "images", "path": str(folder / "images")}
    (folder / "cache.yaml").write_text(yaml.safe_dump({**RUN, "model": "demo/dit", "data": images}))
    return folder


def _image(pixels: Any) -> Any:
    from PIL import Image

    return Image.fromarray(pixels)


@cache
def checkpoint() -> Path:
    """Convert the tiny model, and save the student."""
    folder = workshop() / "student"
    ec.save(ec.linearize(str(workshop() / "model")), folder)
    return folder


@cache
def plan() -> ec.Plan:
    """Plan the conversion of the tiny model."""
    return ec.plan(str(workshop() / "model"))


@cache
def original() -> nn.Module:
    """Load the tiny model."""
    return ec.load_model(str(workshop() / "model")).model


def inputs_of(height: int, width: int) -> dict[str, Any]:
    """Make the inputs of a forward, a function of the size."""
    generator = torch.Generator().manual_seed(height * 1000 + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    text = {"encoder_hidden_states": normal(1, 7, 24), "pooled_projections": normal(1, 24)}
    return {"hidden_states": normal(1, 4, height // 8, width // 8), "timestep": torch.full((1,), 400.0), "return_dict": False, **text}
