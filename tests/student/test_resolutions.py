"""A model that attends at several resolutions: every site has its own grid, in the sizes of the inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import edit_compile as ec
import toy


class Pyramid(nn.Module):
    """Images (B, 3, H, W) to images, attention at full, half and full resolution; the middle one is downsampled by a convolution."""

    def __init__(self, channels: int = 24) -> None:
        super().__init__()
        self.patch, self.out = nn.Conv2d(3, channels, 2, stride=2), nn.ConvTranspose2d(channels, 3, 2, stride=2)
        self.down, self.up = nn.Conv2d(channels, channels, 3, stride=2, padding=1), nn.Conv2d(channels, channels, 1)
        self.fine, self.coarse, self.last = (toy.ToyBlock(channels, heads=2, text_first=False, qk_norm=True) for _ in range(3))

    def attend(self, block: nn.Module, image: torch.Tensor) -> torch.Tensor:
        tokens, _ = block(image.flatten(2).transpose(1, 2), None, None, None)
        return tokens.transpose(1, 2).unflatten(2, image.shape[2:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        image = self.attend(self.fine, self.patch(x))
        small = self.attend(self.coarse, self.down(image))
        image = image + nn.functional.interpolate(self.up(small), size=image.shape[2:], mode="nearest")
        return self.out(self.attend(self.last, image))


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    model = toy.shaken(Pyramid().eval(), amount=0.1)
    return model, ec.linearize(model, example_inputs=toy.inputs(2, 20, 28))


def test_each_site_has_the_grid_of_its_resolution(pair):
    _, student = pair
    plan = ec.plan_of(student)
    assert [site.action for site in plan] == ["edit"] * 3
    fine, coarse, last = (site.grid.sizes for site in plan)
    assert fine == last == plan.grid.expressions
    assert coarse != fine
    assert [site.grid_sizes for site in plan] == [(10, 14), (5, 7), (10, 14)]


@pytest.mark.parametrize(("height", "width"), [(20, 28), (12, 36), (36, 12), (10, 14)])
@torch.no_grad()
def test_sites_see_their_own_grid_in_every_call(pair, height, width):
    model, student = pair
    seen = []
    handles = [
        module.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[2:])))
        for name, module in student.named_modules()
        if name.endswith("attn.edit.key.conv")
    ]
    x = toy.inputs(1, height, width)["x"]
    y = student(x=x)
    for handle in handles:
        handle.remove()
    h, w = height // 2, width // 2
    assert seen == [(h, w), (-(-h // 2), -(-w // 2)), (h, w)]
    with ec.grid(student, h, w):
        assert torch.equal(student(x=x), y)
    with ec.teacher(student):
        assert torch.equal(student(x=x), model(x=x))


@torch.no_grad()
def test_a_stated_grid_is_the_finest_and_is_checked(pair):
    _, student = pair
    with pytest.raises(ec.GridError), ec.grid(student, 5, 7):
        student(**toy.inputs(1, 20, 28))


def test_it_is_saved_and_loaded(pair, tmp_path):
    model, student = pair
    ec.save(student, tmp_path)
    loaded, inputs = ec.load(tmp_path, model), toy.inputs(1, 12, 20)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs), student(**inputs))
