"""A small transformer of videos, written for the tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import toy


class Clip(nn.Module):
    """Videos (B, 3, t, 2h, 2w), and text (B, T, 6) if `joint`, through one toy block over all of their tokens."""

    def __init__(self, channels: int = 24, *, joint: bool = False, text_first: bool = False) -> None:
        super().__init__()
        self.channels, self.text_first = channels, text_first
        self.patch = nn.Conv3d(3, channels, (1, 2, 2), (1, 2, 2))
        self.text = nn.Linear(6, channels) if joint else None
        self.block = toy.ToyBlock(channels, heads=2, text_first=text_first, qk_norm=True)
        self.out = nn.ConvTranspose3d(channels, 3, (1, 2, 2), (1, 2, 2))

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        video = self.patch(x)
        tokens = video.flatten(2).transpose(1, 2)
        prompt = self.text(text) if self.text is not None and text is not None else None
        length = tokens.shape[1] if prompt is None else tokens.shape[1] + prompt.shape[1]
        angles = torch.arange(length, device=x.device)[:, None] * torch.linspace(1, 0.1, self.channels // 2, device=x.device)
        table = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        tokens, _ = self.block(tokens, prompt, table, None)
        return self.out(tokens.transpose(1, 2).unflatten(2, video.shape[2:]))


def clip(grid: tuple[int, ...], joint: bool, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(grid))
    t, h, w = grid
    given = {"x": torch.randn(batch, 3, t, 2 * h, 2 * w, generator=generator)}
    return given | ({"text": torch.randn(batch, 5, 6, generator=generator)} if joint else {})
