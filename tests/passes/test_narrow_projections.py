"""Of a fused projection, the design's changed query needs its own channels alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edit_compile as ec
from edit_compile.bench import count_flops

CHANNELS, WIDE = 16, 64


class Parallel(nn.Module):
    """Attention and a feed-forward network beside it, of one projection."""

    def __init__(self, cut):
        super().__init__()
        self.cut, self.project, self.out = cut, nn.Linear(CHANNELS, 3 * CHANNELS + WIDE), nn.Linear(CHANNELS + WIDE, CHANNELS)

    def forward(self, x):
        q, k, v, hidden = self.cut(self.project(x))
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(torch.cat([y, F.gelu(hidden)], -1))


class Model(nn.Module):
    def __init__(self, cut):
        super().__init__()
        self.patch, self.block, self.head = nn.Conv2d(3, CHANNELS, 2, 2), Parallel(cut), nn.Linear(CHANNELS, 12)

    def forward(self, x):
        h, w = x.shape[2] // 2, x.shape[3] // 2
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = self.head(y + self.block(y))
        return F.pixel_shuffle(y.transpose(1, 2).unflatten(2, (h, w)), 2)


def nested(x):
    attention, hidden = x.split([3 * CHANNELS, WIDE], -1)
    return *attention.chunk(3, -1), hidden


def at_once(x):
    return x.split([CHANNELS, CHANNELS, CHANNELS, WIDE], dim=2)


@pytest.mark.parametrize("cut", [nested, at_once])
def test_the_second_call_is_of_the_query_alone(cut):
    torch.manual_seed(0)
    student = ec.linearize(Model(cut).eval(), example_inputs={"x": torch.rand(2, 3, 20, 28)})
    x = torch.rand(1, 3, 12, 16)
    with torch.no_grad():
        narrow = student(x=x)
        found = count_flops(student, {"x": x}, ["block"]).parts["block"]
        hook = student.block.project.register_forward_hook(lambda *_: None)  # as LoRA and quantization, it wants the whole call
        whole = student(x=x)
        more = count_flops(student, {"x": x}, ["block"]).parts["block"]
        hook.remove()
    torch.testing.assert_close(narrow, whole, atol=1e-6, rtol=1e-5)
    assert more - found == 2 * 48 * CHANNELS * (2 * CHANNELS + WIDE)


def test_gradients_reach_the_fused_weight():
    student = ec.linearize(Model(nested).eval(), example_inputs={"x": torch.rand(2, 3, 20, 28)}).requires_grad_()
    student(x=torch.rand(1, 3, 12, 16)).sum().backward()
    parts = student.block.project.weight.grad.split([CHANNELS, CHANNELS, CHANNELS, WIDE])
    assert all(part.any() for part in parts)
