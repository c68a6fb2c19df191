"""A small diffusion transformer, written for the tests: every choice that sites differ in is an option."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ToyAttention(nn.Module):
    """Attention over image tokens (registers before them included) and text tokens, in one sequence."""

    def __init__(
        self,
        channels: int,
        heads: int,
        text_first: bool,
        qk_norm: bool,
        by_hand: bool = False,
        fused: bool = False,
        key_heads: int | None = None,
        repeat_heads: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.text_first, self.by_hand = heads, text_first, by_hand
        self.key_heads, self.repeat_heads = key_heads or heads, repeat_heads
        head_channels = channels // heads
        if fused:
            self.to_qkv = nn.Linear(channels, 3 * channels)
        else:
            self.to_q = nn.Linear(channels, channels)
            self.to_k = nn.Linear(channels, self.key_heads * head_channels)
            self.to_v = nn.Linear(channels, self.key_heads * head_channels)
        self.norm_q = nn.RMSNorm(head_channels, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(head_channels, eps=1e-6) if qk_norm else nn.Identity()
        self.to_out = nn.Linear(channels, channels)

    def forward(
        self, image: Tensor, text: Tensor | None = None, rope: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        tokens = image
        if text is not None:
            tokens = torch.cat([text, image] if self.text_first else [image, text], 1)
        q, k, v = (x.unflatten(2, (-1, tokens.shape[2] // self.heads)).transpose(1, 2) for x in self.projected(tokens))
        q, k = self.norm_q(q), self.norm_k(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return self.to_out(self.attention(q, k, v, mask).transpose(1, 2).flatten(2))

    def projected(self, tokens: Tensor) -> tuple[Tensor, ...]:
        if hasattr(self, "to_qkv"):
            return self.to_qkv(tokens).chunk(3, -1)
        return self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.by_hand:
            return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v
        if self.repeat_heads:
            k, v = (x.repeat_interleave(self.heads // self.key_heads, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=k.shape[1] != q.shape[1])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class ToyBlock(nn.Module):
    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attn = ToyAttention(channels, **options)
        self.ff = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(
        self, image: Tensor, text: Tensor | None, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        n = image.shape[1]
        y = self.attn(self.norm(image), self.norm(text) if text is not None else None, rope, mask)
        if text is not None and self.attn.text_first:
            text, image = text + y[:, :-n], image + y[:, -n:]
        elif text is not None:
            image, text = image + y[:, :n], text + y[:, n:]
        else:
            image = image + y
        return image + self.ff(image), text


class Toy(nn.Module):
    """Pictures (B, 3, H, W) with patches of 2 and, if `joint`, text (B, T, 6) to pictures of the same shape.

    `text_mask` (B, T) is true where text counts; attention gets it as a mask of booleans, or of numbers to add if `additive`.
    `registers` learned tokens come before the image's. `key_heads`, fewer than `heads`, are grouped-query attention's.
    """

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
        fused: bool = False,
        key_heads: int | None = None,
        repeat_heads: bool = False,
        registers: int = 0,
        additive: bool = False,
    ) -> None:
        super().__init__()
        self.rope, self.head_channels, self.text_first, self.additive = rope, channels // heads, text_first, additive
        self.gradient_checkpointing = False
        self.patch = nn.Conv2d(3, channels, 2, stride=2)
        self.text = nn.Linear(6, channels) if joint else None
        self.registers = nn.Parameter(torch.zeros(1, registers, channels)) if registers else None
        options = {"heads": heads, "text_first": text_first, "qk_norm": qk_norm, "by_hand": by_hand}
        options |= {"fused": fused, "key_heads": key_heads, "repeat_heads": repeat_heads}
        self.blocks = nn.ModuleList(ToyBlock(channels, **options) for _ in range(blocks))
        self.out = nn.Linear(channels, 12)

    def forward(self, x: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        picture = self.patch(x)
        b, _, h, w = picture.shape
        image = picture.flatten(2).transpose(1, 2)
        if self.registers is not None:
            image = torch.cat([self.registers.expand(b, -1, -1), image], 1)
        prompt = self.text(text) if self.text is not None and text is not None else None
        mask = self.mask(text_mask, image) if text_mask is not None else None
        table = None
        if self.rope:
            length = image.shape[1] if prompt is None else image.shape[1] + prompt.shape[1]
            angles = torch.arange(length, device=x.device)[:, None] * torch.linspace(1, 0.1, self.head_channels, device=x.device)
            table = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        for block in self.blocks:
            if self.gradient_checkpointing:
                image, prompt = torch.utils.checkpoint.checkpoint(block, image, prompt, table, mask, use_reentrant=False)
            else:
                image, prompt = block(image, prompt, table, mask)
        if self.registers is not None:
            image = image[:, self.registers.shape[1] :]
        y = self.out(image).view(b, h, w, 2, 2, 3).permute(0, 5, 1, 3, 2, 4)
        return y.reshape(b, 3, 2 * h, 2 * w)

    def mask(self, text_mask: Tensor, image: Tensor) -> Tensor:
        """By key, (B, 1, 1, L): every image token counts."""
        every = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
        counts = torch.cat([text_mask, every] if self.text_first else [every, text_mask], 1)[:, None, None]
        return (~counts).to(image.dtype) * torch.finfo(image.dtype).min if self.additive else counts


def inputs(
    batch: int = 2, height: int = 10, width: int = 14, text: int | None = None, seed: int = 0, padded: bool = False
) -> dict[str, Tensor]:
    """Of one forward. If `padded`, the first prompt has two tokens of padding and each further one has one more, up to all."""
    generator = torch.Generator().manual_seed(seed)
    found = {"x": torch.randn(batch, 3, height, width, generator=generator)}
    if text is None:
        return found
    found["text"] = torch.randn(batch, text, 6, generator=generator)
    lengths = text - 2 - torch.arange(batch)
    return found | {"text_mask": torch.arange(text) < lengths[:, None]} if padded else found


def shaken(module: nn.Module, seed: int = 0, amount: float = 0.3) -> nn.Module:
    """The module with noise added to every parameter: nothing stays at an identity start, no path is dead."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator).to(parameter))
    return module
