"""`kv-compress` against its formula in float64, through the public face, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import edit_compile as ec
import reference
import small_picture
import toy
import whole_sequence
from edit_compile.designs import find_design
from edit_compile.designs.kv_compress import WindowMean
from reference import Array
from whole_sequence import CASES, Grid, Maps, plain


def layer_norm(layer: nn.Module, token: Array) -> Array:
    mean = sum(token) / len(token)
    variance = sum((each - mean) ** 2 for each in token) / len(token)
    return (token - mean) / math.sqrt(variance + 1e-5) * reference.weight(layer) + reference.weight(layer, "bias")


def windows(layer: nn.Module, x: Array, grid: Grid, k: int) -> Array:
    """The compressed tokens of (N, C), frame by frame, one window after the other; the last row and column are repeated."""
    kernel, found = reference.weight(layer.conv), []
    for frame in reference.as_frames(x, grid):
        height, width, channels = frame.shape
        for top in range(0, height, k):
            for left in range(0, width, k):
                total = reference.weight(layer.conv, "bias")
                for a in range(k):
                    for b in range(k):
                        token = frame[min(top + a, height - 1), min(left + b, width - 1)]
                        total = total + [kernel[c, 0, a, b] * token[c] for c in range(channels)]
                found.append(layer_norm(layer.norm, total) if isinstance(layer.norm, nn.LayerNorm) else total)
    return np.array(found)


def softmax_weight(q: Array, k: Array) -> float:
    return math.exp(sum(float(a) * float(b) for a, b in zip(q, k, strict=True)) / math.sqrt(len(q)))


def maps(k: int) -> Maps:
    return Maps(
        plain(0),
        lambda module, image, grid: windows(module.edit.key, reference.project(module, 1, image), grid, k),
        lambda module, image, grid: windows(module.edit.value, reference.project(module, 2, image), grid, k),
    )


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_formula(case: str):
    whole_sequence.check("kv-compress", {}, CASES[case], maps(2), softmax_weight, stride=2, balanced=True)


def test_larger_windows_with_layer_norm_and_no_balance_are_the_formula():
    config = {"factor": 3, "layer_norm": True, "balance": False}
    whole_sequence.check("kv-compress", config, {"joint": True, "padded": True, "rope": True}, maps(3), softmax_weight, stride=3)


@pytest.mark.parametrize("additive", [False, True])
def test_balanced_it_is_the_teacher_where_the_keys_of_a_window_are_alike(additive: bool):
    """Also in windows that the image does not fill, with text that counts in part."""
    model = toy.shaken(toy.Toy(blocks=1, joint=True, additive=additive).eval()).double()
    student = ec.linearize(model, ec.LinearizeConfig(design="kv-compress"), toy.inputs(text=5, padded=True)).double()
    image = torch.randn(2, 3, 4, 24, dtype=torch.float64).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :5, :7].flatten(1, 2)
    text = torch.randn(2, 5, 24, dtype=torch.float64)
    mask = model.mask(torch.tensor([[True] * 5, [True] * 2 + [False] * 3]), image)
    with torch.no_grad(), ec.grid(student, 5, 7):
        found, wanted = (each.blocks[0].attn(image, text, None, mask) for each in (student, model))
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


def hand(h: int, w: int, others: int) -> int:
    """Two convolutions of 2 x 2 over 24 channels, and 2 * 24 multiplications for each query and key."""
    keys = math.ceil(h / 2) * math.ceil(w / 2)
    return 2 * (2 * 4 * 24 * keys + 2 * 24 * (h * w + others) * (keys + others))


def test_a_model_is_converted_at_the_cost_counted_by_hand():
    student = whole_sequence.check_conversion("kv-compress", {}, hand)
    student(**toy.inputs(text=4)).square().sum().backward()
    added = {name: p.grad for name, p in student.named_parameters() if ".edit." in name}
    assert len(added) == 2 * 4
    assert all(g is not None and g.isfinite().all() for g in added.values())


def test_a_fused_projection_is_converted():
    small_picture.check_converted(small_picture.Picture(), "kv-compress", config=ec.LinearizeConfig(design="kv-compress", factor=4))


@pytest.mark.slow
@torch.no_grad()
def test_it_compiles_to_as_many_graphs_as_the_original():
    """Windows that the image does not fill depend on its size, which stays open."""
    sizes = [toy.inputs(2, 10, 14, 5), toy.inputs(1, 6, 18, 3), toy.inputs(3, 12, 10, 4)]
    model = toy.Toy(joint=True).eval()
    student = ec.linearize(model, ec.LinearizeConfig(design="kv-compress"), sizes[0])
    expected = [student(**given) for given in sizes]
    of_model, of_student = CompileCounter(), CompileCounter()
    for block in model.blocks:
        block.compile(backend=of_model, dynamic=True, fullgraph=True)
    for given in sizes:
        model(**given)
    torch._dynamo.reset()
    ec.compile(student, backend=of_student)
    for given, wanted in zip(sizes, expected, strict=True):
        torch.testing.assert_close(student(**given), wanted, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
    assert of_student.frame_count <= of_model.frame_count


@pytest.mark.parametrize("grid", [(4, 6), (2, 4, 6)])
def test_untrained_a_key_is_its_windows_mean(grid: tuple[int, ...]):
    x = torch.randn(2, 8, *grid, dtype=torch.float64)
    means = WindowMean(8, 2, layer_norm=False).double()(x)
    wanted = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    torch.testing.assert_close(means, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (3, 4), (5, 2)])
def test_a_window_that_the_image_does_not_fill_is_the_mean_of_its_tokens(size: tuple[int, int]):
    h, w = size
    x = torch.randn(1, 3, h, w, dtype=torch.float64)
    means = WindowMean(3, 2, layer_norm=False).double()(x)
    assert means.shape[2:] == ((h + 1) // 2, (w + 1) // 2)
    for i in range((h + 1) // 2):
        for j in range((w + 1) // 2):
            wanted = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3))
            torch.testing.assert_close(means[:, :, i, j], wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("grid", "compressed"), [((5, 7), 12), ((3, 5, 7), 36), ((2, 2), 1)])
def test_it_answers_for_its_compressed_keys_alone(grid: tuple[int, ...], compressed: int):
    design, n = find_design("kv-compress"), math.prod(grid)
    assert design.allows(n, compressed, grid, design.Options())
    assert design.allows(compressed, n, grid, design.Options())
    assert not design.allows(n, compressed + 1, grid, design.Options())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 1}, "^factor=1: input should be greater than or equal to 2$"),
        ({"factor": 2.5}, "^factor=2.5: input should be a valid integer"),
        ({"stride": 2}, "^unknown option 'stride'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ec.ConfigError, match=message):
        ec.LinearizeConfig(design="kv-compress", **options)
