"""Compiled by Inductor, a converted model's blocks have the gradients that they have as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import edit_compile as ec
import toy
from families import FAMILIES

GRIDS = [(8, 12), (12, 10)]


def gradients(model: nn.Module, height: int, width: int, text: int | None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**toy.inputs(2, height, width, text)).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it itself
@pytest.mark.parametrize(
    ("text", "options"),
    [(None, {}), pytest.param(5, {"mode": "reduce-overhead"}, marks=pytest.mark.slow)],
    ids=["image alone", "joint, with a mode"],
)
def test_blocks_are_trained_at_several_sizes(text, options):
    torch.compiler.reset()
    model = toy.Toy(joint=text is not None, blocks=1).eval()
    student = toy.shaken(ec.linearize(model, example_inputs=toy.inputs(text=text)))
    compiled = ec.compile(copy.deepcopy(student), **options)
    for grid in GRIDS:
        expected, found = gradients(student, *grid, text), gradients(compiled, *grid, text)
        check(found, expected)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("name", ["pixart", "sd3-dual", "flux"])
def test_blocks_of_diffusers_are_trained(name):
    torch.compiler.reset()
    model, example = FAMILIES[name]()
    student = ec.linearize(model, example_inputs=example)
    compiled = ec.compile(copy.deepcopy(student))
    found = []
    for each in (student, compiled):
        each(**example)[0].square().mean().backward()
        found.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    check(*found)
    torch.compiler.reset()


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same gradients; some are zero but for rounding, as of a bias before a normalisation."""
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-5 * largest, name
