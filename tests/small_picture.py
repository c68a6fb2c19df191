"""A transformer over the patches of an image, small enough to convert in a second, whose blocks attend as a test says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edit_compile as ec

LATENT, PATCH, WIDTH, HEADS = 4, 2, 32, 4
SIZES = ((2, 6, 10), (1, 8, 5))  # batch, height and width in image tokens: of the example, and of another call
TOLERANCE = 1e-5

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """Pre-norm attention over (B, N, C); `attend` maps queries, keys and values (B, H, N, D) to (B, H, N, D)."""

    def __init__(self, attend: Attend | None = F.scaled_dot_product_attention) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        if attend is not None:
            self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Picture(nn.Module):
    """Patches, two blocks, an image again: x (B, 4, 2 h, 2 w) to the same shape."""

    def __init__(self, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(LATENT, WIDTH, PATCH, PATCH)
        self.blocks = nn.ModuleList([block(), block()])
        self.head = nn.Linear(WIDTH, LATENT * PATCH * PATCH)

    def run(self, y: Tensor) -> Tensor:
        for block in self.blocks:
            y = block(y)
        return y

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x)
        h, w = y.shape[2:]
        return F.pixel_shuffle(self.head(self.run(y.flatten(2).transpose(1, 2))).transpose(1, 2).unflatten(2, (h, w)), PATCH)


def image(batch: int, height: int, width: int) -> dict[str, Tensor]:
    """Make a call's arguments; height and width in image tokens."""
    return {"x": torch.randn(batch, LATENT, PATCH * height, PATCH * width)}


def check_converted(
    model: nn.Module, design: str, paths: tuple[str, ...] = ("blocks.0", "blocks.1"), config: ec.LinearizeConfig | None = None
) -> nn.Module:
    """Convert a model; assert that its sites get the design, its teacher is the original, and it runs at another size.

    Args:
        paths: the sites' paths begin with them, one site each.
    """
    model.eval()
    example = image(*SIZES[0])
    plan = ec.plan(model, config, example)
    assert [site.path.startswith(path) for site, path in zip(plan.sites, paths, strict=True)] == [True] * len(paths)
    assert [(site.action, site.reason) for site in plan.sites if site.action != design] == []
    student = ec.linearize(model, config, example)
    for size in SIZES:
        inputs = image(*size)
        with torch.no_grad():
            original, converted = model(**inputs), student(**inputs)
            assert converted.shape == original.shape
            assert converted.isfinite().all()
            assert (converted - original).abs().max() > TOLERANCE
            with ec.teacher(student):
                torch.testing.assert_close(student(**inputs), original, atol=TOLERANCE, rtol=0)
    return student


def reasons(model: nn.Module, **more: Any) -> dict[str, str]:
    """Plan a model, assert that nothing is rewritten, and return why, by path."""
    plan = ec.plan(model.eval(), **{"example_inputs": image(*SIZES[0]), **more})
    assert [site.path for site in plan.sites if site.rewritten] == []
    return {site.path: site.reason for site in plan.sites}
