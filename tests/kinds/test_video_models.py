"""Models over the tokens of videos, in the ways that they are put together: which sites are rewritten, and on which grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edit_compile as ec
import toy

CHANNELS, HEADS, LATENT = 24, 2, 4


class Attention(nn.Module):
    """Over (B, N, C), or of these over other tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.q, self.k, self.v = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))

    def forward(self, x: Tensor, others: Tensor | None = None, table: Tensor | None = None) -> Tensor:
        normed = self.norm(x)
        seen = normed if others is None else others
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.q(normed), self.k(seen), self.v(seen)))
        if table is not None:
            q, k = q * table, k * table
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Clip(nn.Module):
    """Patches of `patch` along (t, h, w) of (B, 4, t, h, w), and back."""

    patch = (1, 2, 2)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(LATENT, CHANNELS, self.patch, self.patch)
        self.unembed = nn.ConvTranspose3d(CHANNELS, LATENT, self.patch, self.patch)
        self.text = nn.Linear(6, CHANNELS)
        self.build()

    def build(self) -> None:
        self.attn = Attention()

    def run(self, video: Tensor, text: Tensor) -> Tensor:
        """Of (B, C, t, h, w), by default over all tokens."""
        return self.attn(video.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, video.shape[2:])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.unembed(self.run(self.embed(x), self.text(text)))


class PatchesInTime(Clip):
    """Two frames a patch, a table over (t, h, w) made inside, cross-attention to text: Wan's and Allegro's structure."""

    patch = (2, 2, 2)

    def build(self) -> None:
        self.attn, self.cross = Attention(), Attention()

    def run(self, video: Tensor, text: Tensor) -> Tensor:
        t, h, w = (torch.arange(n, device=video.device, dtype=video.dtype) for n in video.shape[2:])
        table = (t[:, None, None] + 0.3 * h[:, None] + 0.1 * w).flatten().cos()[:, None]
        tokens = self.cross(self.attn(video.flatten(2).transpose(1, 2), None, table), text)
        return tokens.transpose(1, 2).unflatten(2, video.shape[2:])


class FramesFirst(Clip):
    """(B, t, C, h, w) by frames, text before the video in one sequence: CogVideoX's structure."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        frames = self.embed(x.transpose(1, 2)).transpose(1, 2)  # (B, t, C, h, w)
        tokens = frames.flatten(3).transpose(2, 3).flatten(1, 2)
        text = self.text(text)
        joint = self.attn(torch.cat([text, tokens], 1))[:, text.shape[1] :]
        batch, t, _, h, w = frames.shape
        return self.unembed(joint.reshape(batch, t, h, w, CHANNELS).permute(0, 4, 1, 2, 3)).transpose(1, 2)


class TextInFrames(Clip):
    """Within each frame, then to the text, which is repeated for every frame: Latte's spatial block."""

    def build(self) -> None:
        self.space, self.cross = Attention(), Attention()

    def run(self, video: Tensor, text: Tensor) -> Tensor:
        batch, _, t, h, w = video.shape
        frames = video.permute(0, 2, 3, 4, 1).reshape(batch * t, h * w, CHANNELS)
        frames = self.cross(self.space(frames), text.repeat_interleave(t, dim=0, output_size=batch * t))
        return frames.reshape(batch, t, h, w, CHANNELS).permute(0, 4, 1, 2, 3)


class SpaceAndTime(Clip):
    """Within each frame, then across frames at each position: Latte's and AnimateDiff's structure."""

    def build(self) -> None:
        self.space, self.time = Attention(), Attention()

    def run(self, video: Tensor, text: Tensor) -> Tensor:
        batch, _, t, h, w = video.shape
        frames = video.permute(0, 2, 3, 4, 1).reshape(batch * t, h * w, CHANNELS)
        frames = self.space(frames).reshape(batch, t, h * w, CHANNELS)
        positions = frames.permute(0, 2, 1, 3).reshape(batch * h * w, t, CHANNELS)
        positions = self.time(positions).reshape(batch, h * w, t, CHANNELS)
        return positions.permute(0, 3, 2, 1).unflatten(3, (h, w))


def inputs(batch: int, t: int, h: int, w: int, frames_first: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(t)
    shape = (batch, t, LATENT, h, w) if frames_first else (batch, LATENT, t, h, w)
    return {"x": torch.randn(shape, generator=generator), "text": torch.randn(batch, 5, 6, generator=generator)}


CAUSAL = {"temporal": "causal", "temporal_stride": 2}
MODELS: list[tuple[type[Clip], dict[str, str], int, dict[str, Any]]] = [
    (Clip, {"attn": "edit"}, 3, CAUSAL),
    (PatchesInTime, {"attn": "edit", "cross": "keep"}, 3, {}),
    (FramesFirst, {"attn": "mm-edit"}, 3, CAUSAL),
    (SpaceAndTime, {"space": "edit", "time": "keep"}, 2, CAUSAL),
]


@pytest.mark.parametrize(("kind", "actions", "dims", "config"), MODELS)
def test_sites_are_rewritten_on_their_grids(kind: type[Clip], actions: dict[str, str], dims: int, config: dict[str, Any]):
    torch.manual_seed(0)
    model = toy.shaken(kind().eval())
    example = inputs(2, 6, 10, 14, kind is FramesFirst)
    student = ec.linearize(model, ec.LinearizeConfig(**config), example_inputs=example)
    plan = ec.plan_of(student)
    assert {site.path: site.action for site in plan.sites} == actions
    assert {len(site.grid.sizes) for site in plan.rewritten} == {dims}
    for given in (example, inputs(1, 4, 14, 6, kind is FramesFirst)):
        with torch.no_grad():
            original, output = model(**given), student(**given)
            with ec.teacher(student):
                taught = student(**given)
        torch.testing.assert_close(taught, original, atol=1e-5, rtol=0)
        assert output.shape == original.shape
        assert output.isfinite().all()
        assert not torch.allclose(output, original, atol=1e-3)
    time = [site.reason for site in plan.sites if site.path == "time"]
    assert all("part of the image's dimensions are in the batch" in reason for reason in time)


def test_text_that_is_repeated_for_every_frame_is_text():
    plan = ec.plan(TextInFrames().eval(), example_inputs=inputs(2, 6, 10, 14))
    assert plan["space"].action == "edit"
    assert plan["cross"].reason == "cross-attention: linear in image tokens already"


class InsideEachPatch(Clip):
    """Between the pixels of each patch, then between patches: the inner and outer attention of transformers in transformers."""

    def build(self) -> None:
        self.pixels, self.inner, self.outer = nn.Linear(LATENT, CHANNELS), Attention(), Attention()
        self.joined = nn.Linear(16 * CHANNELS, CHANNELS)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        grid = x.shape[2] // 4, x.shape[3] // 4
        pixels = F.unfold(x, 4, stride=4).transpose(1, 2).flatten(0, 1).unflatten(1, (LATENT, 16)).transpose(1, 2)
        tokens = self.joined(self.inner(self.pixels(pixels)).flatten(1)).unflatten(0, (x.shape[0], -1))
        return self.outer(tokens).transpose(1, 2).unflatten(2, grid)


def test_attention_inside_each_patch_has_the_image_in_its_batch():
    plan = ec.plan(InsideEachPatch().eval(), example_inputs={"x": torch.randn(2, LATENT, 24, 40), "text": torch.randn(2, 5, 6)})
    assert "part of the image's dimensions are in the batch" in plan["inner"].reason
    assert plan["outer"].action == "edit"
