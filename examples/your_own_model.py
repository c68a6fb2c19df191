"""A transformer that this package has never seen: give example inputs, all sizes different, and its structure does the rest."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edit_compile as ec


class Block(nn.Module):
    """Joint attention of image and text tokens over one fused projection."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(tokens)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return tokens + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Denoiser(nn.Module):
    """(B, 3, H, W) and prompts (B, T, 16) to (B, 3, H, W)."""

    def __init__(self, channels: int = 64, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, channels, 2, stride=2)
        self.prompt = nn.Linear(16, channels)
        self.blocks = nn.ModuleList(Block(channels, heads) for _ in range(depth))
        self.unpatch = nn.ConvTranspose2d(channels, 3, 2, stride=2)

    def forward(self, image: Tensor, prompt: Tensor) -> Tensor:
        patches = self.patch(image)
        tokens = torch.cat([self.prompt(prompt), patches.flatten(2).transpose(1, 2)], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.unpatch(tokens[:, prompt.shape[1] :].transpose(1, 2).unflatten(2, patches.shape[2:]))


model = Denoiser().eval()
example_inputs = {"image": torch.randn(2, 3, 20, 28), "prompt": torch.randn(2, 9, 16)}
student = ec.linearize(model, example_inputs=example_inputs)
print(ec.plan_of(student))

with torch.no_grad():  # any resolution, any prompt length
    print(tuple(student(torch.randn(1, 3, 64, 96), torch.randn(1, 5, 16)).shape))
