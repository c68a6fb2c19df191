"""A small transformer over packed patches, (batch, tokens, channels), with or without text; tests say what tells its grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edit_compile as ec

CHANNELS, WIDTH, TEXT_WIDTH, HEADS = 8, 32, 24, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Packed(nn.Module):
    """Subclasses have the forward; `run` joins text and image, adds a table by token, and returns the image's part."""

    text_first = True

    def __init__(self, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.enter, self.text, self.leave = nn.Linear(CHANNELS, WIDTH), nn.Linear(TEXT_WIDTH, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.blocks = nn.ModuleList([block(), block()])

    def run(self, image: Tensor, text: Tensor | None, table: Tensor, *extra: Any) -> Tensor:
        x = self.enter(image)
        if text is not None:
            x = torch.cat([self.text(text), x] if self.text_first else [x, self.text(text)], 1)
        x = x + torch.sin(table[..., None].to(x.dtype) / 10)
        for block in self.blocks:
            x = block(x, *extra)
        tokens = image.shape[1]
        return self.leave(x if text is None else x[:, text.shape[1] :] if self.text_first else x[:, :tokens])


def latents(*grids: tuple[int, ...], batch: int = 2) -> Tensor:
    return torch.randn(batch, sum(int(torch.tensor(grid).prod()) for grid in grids), CHANNELS)


def words(count: int = 7, batch: int = 2) -> Tensor:
    return torch.randn(batch, count, TEXT_WIDTH)


def positions(h: int, w: int, columns: str = "thw", t: float = 0.0, start: float = 0.0, step: float = 1.0) -> Tensor:
    """Make position ids (h * w, columns); a column that is none of t, h and w is zero."""
    y, x = torch.meshgrid(start + step * torch.arange(h), start + step * torch.arange(w), indexing="ij")
    values = {"t": torch.full_like(y, t), "h": y, "w": x}
    return torch.stack([values.get(column, torch.zeros_like(y)) for column in columns], -1).flatten(0, 1)


@torch.no_grad()
def converted(model: nn.Module, example: dict[str, Any]) -> nn.Module:
    """Convert a model with everything that conversion adds away from its identity, and check the teacher."""
    torch.manual_seed(0)
    model.eval()
    student = ec.linearize(model, example_inputs=example)
    for name, parameter in student.named_parameters():
        if ".edit." in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert all(site.rewritten for site in ec.plan_of(student)), str(ec.plan_of(student))
    with ec.teacher(student):
        torch.testing.assert_close(student(**example), model(**example), atol=1e-5, rtol=0)
    return student


@torch.no_grad()
def same_as_stated(student: nn.Module, given: dict[str, Any], *grid: Any) -> Tensor:
    """Check that a forward finds the grid that is stated, and that it makes a difference; return its output."""
    found = student(**given)
    with ec.grid(student, *grid):
        torch.testing.assert_close(student(**given), found, atol=1e-5, rtol=0)
    with ec.teacher(student):
        assert (student(**given) - found).abs().max() > 1e-4
    return found
