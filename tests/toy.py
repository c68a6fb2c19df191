"""A small diffusion transformer, written for the tests: every choice that sites differ in is an option."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ToyAttention(nn.Module):
    def __init__(self, channels: int, heads: int, text_first: bool, qk_norm: bool, by_hand: bool = False) -> None:
        super().__init__()
        self.heads, self.text_first, self.by_hand = heads, text_first, by_hand
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.norm_q = nn.RMSNorm(channels // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(channels // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.to_out = nn.Linear(channels, channels)

    def forward(self, image: Tensor, text: Tensor | None = None, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        tokens = image
        if text is not None:
            tokens = torch.cat([text, image] if self.text_first else [image, text], 1)
        q, k, v = (
            layer(tokens).view(tokens.shape[0], -1, self.heads, tokens.shape[2] // self.heads).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        q, k = self.norm_q(q), self.norm_k(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if self.by_hand:
            y = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(y.transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class ToyBlock(nn.Module):
    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attn = ToyAttention(channels, **options)
        self.ff = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, image: Tensor, text: Tensor | None, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor | None]:
        n = image.shape[1]
        y = self.attn(self.norm(image), self.norm(text) if text is not None else None, rope)
        if text is not None and self.attn.text_first:
            text, image = text + y[:, :-n], image + y[:, -n:]
        elif text is not None:
            image, text = image + y[:, :n], text + y[:, n:]
        else:
            image = image + y
        return image + self.ff(image), text


class Toy(nn.Module):
    """Pictures (B, 3, H, W) with patches of 2 and, if `joint`, text (B, T, 6) to pictures of the same shape."""

    def __init__(
        self,
        channels: int = 24,
        heads: int = 2,
        blocks: int = 2,
        *,
        joint: bool = False,
        text_first: bool = False,
        qk_norm: bool = False,
        rope: bool = False,
        by_hand: bool = False,
    ) -> None:
        super().__init__()
        self.rope, self.head_channels = rope, channels // heads
        self.gradient_checkpointing = False
        self.patch = nn.Conv2d(3, channels, 2, stride=2)
        self.text = nn.Linear(6, channels) if joint else None
        options = {"heads": heads, "text_first": text_first, "qk_norm": qk_norm, "by_hand": by_hand}
        self.blocks = nn.ModuleList(ToyBlock(channels, **options) for _ in range(blocks))
        self.out = nn.Linear(channels, 12)

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        picture = self.patch(x)
        b, _, h, w = picture.shape
        image = picture.flatten(2).transpose(1, 2)
        prompt = self.text(text) if self.text is not None and text is not None else None
        table = None
        if self.rope:
            length = h * w if prompt is None else h * w + prompt.shape[1]
            angles = torch.arange(length, device=x.device)[:, None] * torch.linspace(1, 0.1, self.head_channels, device=x.device)
            table = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        for block in self.blocks:
            if self.gradient_checkpointing:
                image, prompt = torch.utils.checkpoint.checkpoint(block, image, prompt, table, use_reentrant=False)
            else:
                image, prompt = block(image, prompt, table)
        y = self.out(image).view(b, h, w, 2, 2, 3).permute(0, 5, 1, 3, 2, 4)
        return y.reshape(b, 3, 2 * h, 2 * w)


def inputs(batch: int = 2, height: int = 10, width: int = 14, text: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {"x": torch.randn(batch, 3, height, width, generator=generator)}
    return found if text is None else found | {"text": torch.randn(batch, text, 6, generator=generator)}


def shaken(module: nn.Module, seed: int = 0, amount: float = 0.3) -> nn.Module:
    """The module with noise added to every parameter: nothing stays at an identity start, no path is dead."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator).to(parameter))
    return module
