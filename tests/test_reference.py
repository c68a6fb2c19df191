"""Converted sites against the paper's formulas in float64."""

import numpy as np
import pytest
import torch

import edit_compile as ec
import reference
import toy

GRIDS = [(5, 7), (4, 6), (3, 3), (6, 5)]


def converted(config: ec.LinearizeConfig, **options):
    model = toy.shaken(toy.Toy(blocks=1, **options).eval())
    example = toy.inputs(text=5 if options.get("joint") else None)
    return toy.shaken(ec.linearize(model, config, example), seed=1, amount=0.2)


def outputs(student, batch, h, w, text):
    """The site's inputs and output in a forward of the whole model."""
    seen = {}

    def keep(module, args, output):
        seen.update(args=args, output=output)

    handle = student.blocks[0].attn.register_forward_hook(keep)
    with torch.no_grad():
        student(**toy.inputs(batch, 2 * h, 2 * w, text, seed=2))
    handle.remove()
    return seen


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "norm+rope"])
def rotary(request):
    return request.param


@pytest.fixture(scope="module")
def edit(rotary):
    return converted(ec.LinearizeConfig(), qk_norm=rotary, rope=rotary)


@pytest.mark.parametrize(("h", "w"), GRIDS)
@pytest.mark.parametrize("batch", [1, 2])
def test_edit_is_the_formula(edit, rotary, batch, h, w):
    seen = outputs(edit, batch, h, w, None)
    for sample in range(batch):
        image = seen["args"][0][sample].double().numpy()
        expected = reference.site(edit.blocks[0].attn, image, None, h, w, rotary=rotary, eta="exact", full_text_keys=True)
        np.testing.assert_allclose(seen["output"][sample].numpy(), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module", params=["ratio", "exact", "calibrated"])
def eta(request):
    return request.param


@pytest.fixture(scope="module", params=["full", "compressed"])
def text_keys(request):
    return request.param


@pytest.fixture(scope="module", params=[False, True], ids=["image-first", "text-first"])
def text_first(request):
    return request.param


@pytest.fixture(scope="module")
def mm_edit(rotary, eta, text_keys, text_first):
    config = ec.LinearizeConfig(eta=eta, text_keys=text_keys)
    return converted(config, joint=True, text_first=text_first, qk_norm=rotary, rope=rotary)


@pytest.mark.parametrize(("h", "w"), GRIDS)
def test_mm_edit_is_the_formula(mm_edit, rotary, eta, text_keys, h, w):
    batch = 1 + h % 2
    seen = outputs(mm_edit, batch, h, w, 4)
    for sample in range(batch):
        image, text = (x[sample].double().numpy() for x in seen["args"][:2])
        site = mm_edit.blocks[0].attn
        expected = reference.site(site, image, text, h, w, rotary=rotary, eta=eta, full_text_keys=text_keys == "full")
        np.testing.assert_allclose(seen["output"][sample].numpy(), expected, atol=1e-5, rtol=1e-5)
