"""`mix-ffn` against its formula in float64, and its start, which is the teacher's network."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edit_compile as ec
import reference
import toy
from edit_compile.designs import find_design
from edit_compile.designs.mix_ffn import GatedConv
from edit_compile.ir.site import Site
from edit_compile.ir.tokens import TokenLayout
from reference import Array
from toy_clip import Clip, clip

GRIDS = {"image": (5, 3), "registers": (4, 6), "video": (2, 3, 4)}
RULES = ec.LinearizeConfig(rules=[ec.Rule("*ff", "mix-ffn")])


def converted(case: str) -> tuple[nn.Module, nn.Module]:
    """The student and its feed-forward network."""
    torch.manual_seed(0)
    if case == "video":
        student = ec.linearize(toy.shaken(Clip().eval()), RULES, clip((3, 4, 6), joint=False))
        return student, student.block.ff
    model = toy.Toy(blocks=1, registers=3 if case == "registers" else 0)
    student = ec.linearize(toy.shaken(model.eval()), RULES, toy.inputs())
    return student, student.blocks[0].ff


def inputs(case: str) -> dict[str, torch.Tensor]:
    grid = GRIDS[case]
    given = clip(grid, joint=False) if case == "video" else toy.inputs(2, 2 * grid[0], 2 * grid[1])
    return {name: x.double() for name, x in given.items()}


def seen_by(student: nn.Module, network: nn.Module, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    seen: list[Any] = []
    handle = network.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    with torch.no_grad():
        student(**given)
    handle.remove()
    return seen[0], seen[1]


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def mix_ffn(network: nn.Module, x: Array, grid: tuple[int, ...]) -> Array:
    """Tokens (R + N, C), registers before the image's, through the network: the convolutions are over the last N."""
    hidden = np.array([[gelu(each) for each in token] for token in reference.linear(network[0], x)])
    added, outside = network.edit.conv, len(x) - math.prod(grid)
    gated = []
    for frame in reference.as_frames(hidden[outside:], grid):
        values, gates = (reference.conv(layer, frame, 1, True).reshape(-1, hidden.shape[1]) for layer in (added.value, added.gate))
        gated += [[v * (1 + silu(g)) for v, g in zip(*token, strict=True)] for token in zip(values, gates, strict=True)]
    return reference.linear(network[2], np.concatenate([hidden[:outside], np.array(gated)]))


@pytest.mark.parametrize("case", GRIDS)
def test_it_begins_as_its_teacher_and_is_the_formula(case: str):
    student, network = converted(case)
    student.double()
    given = inputs(case)
    _, first = seen_by(student, network, given)
    with ec.teacher(student):
        _, taught = seen_by(student, network, given)
    torch.testing.assert_close(first, taught, atol=1e-12, rtol=0)
    toy.shaken(student, seed=1, amount=0.2)
    received, output = seen_by(student, network, given)
    for sample in range(len(output)):
        wanted = mix_ffn(network, received[sample].numpy(), GRIDS[case])
        np.testing.assert_allclose(output[sample].numpy(), wanted, atol=1e-10 * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_untrained_it_changes_nothing_in_any_precision(dtype: torch.dtype):
    x = torch.randn(2, 8, 5, 7).to(dtype)
    assert torch.equal(GatedConv(8).to(dtype)(x), x)
    assert not torch.equal(GatedConv(8, identity=False).to(dtype)(x), x)


def test_untrained_its_gate_learns():
    module = GatedConv(4)
    module(torch.randn(1, 4, 5, 5)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_frames_by_themselves_are_images():
    torch.manual_seed(0)
    module, x = GatedConv(4, identity=False), torch.randn(2, 4, 3, 5, 6)
    for frame in range(3):
        torch.testing.assert_close(module(x)[:, :, frame], module(x[:, :, frame]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("dims", "ok"), [(2, True), (3, True), (None, True), (4, False)])
def test_it_is_for_images_and_videos(dims: int | None, ok: bool):
    layout = TokenLayout.of(("image", "n"))
    design = find_design("mix-ffn")
    assert design.accepts(Site("feed_forward", "ff", layout, layout, dims), design.Options()).ok is ok
