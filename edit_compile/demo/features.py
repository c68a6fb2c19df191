"""Features of images of the demos, and the Frechet distance between two sets of them.

The features are those of a small classifier that reads, in every quadrant, the colour, shape, texture, size and number of its
objects, and the background. It was trained by `scripts/train_demo_features.py`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit_compile.demo import groups, shapes

FOLDER = Path(__file__).parent / "features-64"
WEIGHTS = FOLDER / "model.safetensors"
HEADS = {  # what is told of a quadrant's group, and the classes
    "colour": tuple(shapes.COLOURS),
    "shape": shapes.SHAPES,
    "texture": groups.TEXTURES,
    "size": tuple(groups.SIZES),
    "count": ("nothing", *groups.COUNTS),
}
BACKGROUNDS = tuple(shapes.BACKGROUNDS)
_QUADRANT = groups.IMAGE_SIZE // 2
_BATCH = 64


class GroupClassifier(nn.Module):
    """Tells of every quadrant what is in it. An image of 32 px is one quadrant: it shows as much as one of an image of 64 px."""

    def __init__(self, channels: tuple[int, ...], width: int) -> None:
        """
        Args:
            channels: of the convolutions; the first and the last keep the resolution, those between halve it.
            width: of the features.
        """
        super().__init__()
        layers: list[nn.Module] = []
        for number, (inner, outer) in enumerate(zip((3, *channels), channels, strict=False)):
            stride = 1 if number in (0, len(channels) - 1) else 2
            layers += [nn.Conv2d(inner, outer, 3, stride, 1), nn.GroupNorm(8, outer), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.hidden = nn.Linear(channels[-1], width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(classes)) for name, classes in HEADS.items()})
        self.background = nn.Linear(width, len(BACKGROUNDS))

    def quadrants(self, images: Tensor) -> Tensor:
        """Compute the features of the quadrants of images (B, 3, side, side) in [0, 1], side 32 or 64: (B, 1 or 4, width)."""
        pooled = F.adaptive_avg_pool2d(self.trunk(images * 2 - 1), images.shape[-1] // _QUADRANT)
        return F.relu(self.hidden(pooled.flatten(2).mT))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Classify images (B, 3, 64, 64) in [0, 1]: logits (B, 4, classes) for every head, and (B, classes) for the background."""
        quadrants = self.quadrants(images)
        return {name: head(quadrants) for name, head in self.heads.items()} | {"background": self.background(quadrants.mean(1))}


def from_config(config: dict[str, Any]) -> GroupClassifier:
    """Make an untrained classifier of the sizes in its `config.json`."""
    return GroupClassifier(tuple(config["channels"]), config["width"])


@cache
def classifier() -> GroupClassifier:
    """Load the trained classifier."""
    from safetensors.torch import load_file

    model = from_config(json.loads((FOLDER / "config.json").read_bytes()))
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def features(images: Tensor) -> Tensor:
    """Compute the features of images (B, 3, H, W) in [0, 1]: (B, D) float64, means over the quadrants.

    Images other than of 32 x 32 pixels are scaled to 64 x 64.
    """
    if images.shape[-2:] != (_QUADRANT, _QUADRANT) and images.shape[-2:] != (groups.IMAGE_SIZE, groups.IMAGE_SIZE):
        images = F.interpolate(images, (groups.IMAGE_SIZE, groups.IMAGE_SIZE), mode="bilinear", antialias=True)
    model = classifier()
    parts = torch.split(images.float().cpu(), _BATCH)
    return torch.cat([model.quadrants(part).mean(1).double() for part in parts])


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Compute the Frechet distance between Gaussians fitted to features (N, D) and (M, D), in float64.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Dowson and Landau 1982; as FID in arXiv 1706.08500). The trace of the root
    is the sum of the roots of the eigenvalues of the symmetric S_a^(1/2) S_b S_a^(1/2). Of samples of different captions
    it is far too large unless they are very many: compare sets of the same captions.

    Raises:
        ValueError: a set has fewer than two samples.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"the Frechet distance needs two samples of each at least, not {len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), x.mT.cov().reshape(x.shape[1], x.shape[1])) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    product = root @ cov_b @ root
    roots = torch.linalg.eigvalsh((product + product.mT) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * roots
    return max(float(distance), 0.0)
