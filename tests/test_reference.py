"""Converted sites against the paper's formulas in float64."""

from __future__ import annotations

import copy
import functools
import itertools
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import edit_compile as ec
import reference
import toy
from edit_compile.student.site import converted_sites

GRIDS = [(5, 7), (4, 6), (3, 3), (6, 5)]


class Converted(NamedTuple):
    """A toy with one converted site, and how it was made."""

    student: nn.Module
    options: Any
    joint: bool
    rotary: bool
    padded: bool

    @property
    def site(self) -> nn.Module:
        return self.student.blocks[0].attn


@functools.cache
def planned(padded: bool, **options: Any) -> tuple[nn.Module, ec.Plan]:
    """A toy and its plan, which is the same for every configuration of one design."""
    torch.manual_seed(0)
    model = toy.shaken(toy.Toy(blocks=1, **options).eval())
    return model, ec.plan(model, example_inputs=toy.inputs(text=5 if options.get("joint") else None, padded=padded))


def converted(config: dict[str, Any], *, padded: bool = False, shake: bool = True, **options: Any) -> Converted:
    model, plan = planned(padded, **options)
    joint, rotary = options.get("joint", False), options.get("rope", False)
    torch.manual_seed(0)
    (site,) = plan.sites
    chosen = site.model_copy(update={"options": {**site.options, **config}})
    student = ec.linearize(model, plan=plan.model_copy(update={"sites": (chosen,)}))
    if shake:
        toy.shaken(nn.ModuleList(converted_sites(student).values()), seed=1, amount=0.2)
    own = SimpleNamespace(**{"text_keys": "full", **ec.plan_of(student).sites[0].options})
    return Converted(student, own, joint, rotary, padded)


def seen_by(
    made: Converted, batch: int, h: int, w: int, dtype: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor], Any, torch.Tensor]:
    """The site's image and text tokens, the text mask and the site's output in a forward of the whole model."""
    seen: list[Any] = []
    inputs = toy.inputs(batch, 2 * h, 2 * w, 4 if made.joint else None, seed=2, padded=made.padded)
    handle = made.site.register_forward_hook(lambda module, args, output: seen.extend((args, output)))
    with torch.no_grad():
        made.student(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()})
    handle.remove()
    return [x for x in seen[0][:2] if x is not None], inputs.get("text_mask"), seen[1]


def expected(made: Converted, tokens: list[torch.Tensor], text_mask: torch.Tensor | None, h: int, w: int) -> np.ndarray:
    samples = []
    for sample in range(len(tokens[0])):
        image, text = [x[sample].double().numpy() for x in tokens] + [None] * (2 - len(tokens))
        counts = text_mask[sample].numpy() if text_mask is not None else None
        samples.append(reference.site(made.site, made.options, image, text, (h, w), rotary=made.rotary, counts=counts))
    return np.stack(samples)


def check(made: Converted, batch: int, h: int, w: int) -> None:
    """To 1e-5 of the output's scale, about which its sums are rounded."""
    tokens, text_mask, output = seen_by(made, batch, h, w)
    wanted = expected(made, tokens, text_mask, h, w)
    np.testing.assert_allclose(output.numpy(), wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "norm+rope"])
def rotary(request):
    return request.param


@pytest.fixture(scope="module")
def edit(rotary):
    return converted({}, qk_norm=rotary, rope=rotary)


@pytest.mark.parametrize(("h", "w"), GRIDS)
@pytest.mark.parametrize("batch", [1, 2])
def test_edit_is_the_formula(edit, batch, h, w):
    check(edit, batch, h, w)


IN_EVERY_RUN = {  # every two values meet in one of them; all combinations in `make test-all`
    ("plain", "ratio", "full", "image-first"),
    ("norm+rope", "ratio", "compressed", "text-first"),
    ("plain", "exact", "compressed", "text-first"),
    ("norm+rope", "exact", "full", "image-first"),
    ("plain", "calibrated", "full", "text-first"),
    ("norm+rope", "calibrated", "compressed", "image-first"),
}
COMBINATIONS = itertools.product(
    ("plain", "norm+rope"), ("ratio", "exact", "calibrated"), ("full", "compressed"), ("image-first", "text-first")
)
MARKED = [pytest.param(one, marks=[pytest.mark.slow] * (one not in IN_EVERY_RUN), id="-".join(one)) for one in COMBINATIONS]


@pytest.fixture(scope="module", params=MARKED)
def mm_edit(request):
    positions, eta, text_keys, order = request.param
    rotary = positions == "norm+rope"
    return converted({"eta": eta, "text_keys": text_keys}, joint=True, text_first=order == "text-first", qk_norm=rotary, rope=rotary)


@pytest.mark.parametrize(("h", "w"), GRIDS)
def test_mm_edit_is_the_formula(mm_edit, h, w):
    check(mm_edit, 1 + h % 2, h, w)


JOINT = {"joint": True, "qk_norm": True, "rope": True}
CF_PLAIN = {"key": "conv-fusion", "value": "plain"}
PADDED = {"joint": True, "padded": True}
VARIANTS = {
    # the paper's ablation of query, key and value
    "plain-compressed": ({"query": "plain"}, {}),
    "fusion-fusion-plain": (CF_PLAIN, {"rope": True}),
    "fusion-plain-fusion": ({"key": "plain", "value": "conv-fusion"}, {}),
    "fusion-plain-plain": ({"key": "plain", "value": "plain"}, {"qk_norm": True}),
    "all-plain": ({"query": "plain", "key": "plain", "value": "plain"}, {}),
    "joint-fusion-fusion-plain": (CF_PLAIN, JOINT),
    "joint-all-plain": ({"query": "plain", "key": "plain", "value": "plain", "eta": "ratio"}, JOINT | {"text_first": True}),
    "separable": ({"separable": True}, {"rope": True}),
    "joint-separable-reduction": ({"separable": True, "reduction": 8}, JOINT),
    # projections
    "grouped-heads": ({}, {"heads": 4, "key_heads": 2, "rope": True, "qk_norm": True}),
    "repeated-heads": ({}, {"heads": 6, "key_heads": 2, "repeat_heads": True, "rope": True}),
    "joint-grouped-heads": ({}, JOINT | {"heads": 4, "key_heads": 2}),
    "joint-repeated-heads": ({"eta": "calibrated", "text_keys": "compressed"}, JOINT | {"heads": 6, "key_heads": 2, "repeat_heads": True}),
    "grouped-heads-uncompressed": (CF_PLAIN, JOINT | {"heads": 4, "key_heads": 2}),
    "fused": ({}, {"fused": True, "rope": True, "qk_norm": True}),
    "fused-fusion-fusion-plain": (CF_PLAIN, {"fused": True}),
    "joint-fused": ({}, JOINT | {"fused": True, "text_first": True}),
    # padded prompts
    "boolean-mask-ratio": ({"eta": "ratio"}, PADDED),
    "boolean-mask-exact": ({"eta": "exact"}, PADDED | {"text_first": True}),
    "boolean-mask-calibrated-compressed": ({"eta": "calibrated", "text_keys": "compressed"}, PADDED),
    "additive-mask-ratio": ({"eta": "ratio", "text_keys": "compressed"}, PADDED | {"additive": True, "text_first": True}),
    "additive-mask-exact": ({"eta": "exact"}, PADDED | {"additive": True}),
    "additive-mask-uncompressed": ({"key": "plain", "value": "plain"}, PADDED | {"additive": True}),
    # feature maps
    "elu": ({"features": "elu"}, {"rope": True}),
    "learned": ({"features": "learned"}, {"heads": 4, "key_heads": 2, "qk_norm": True}),
    "joint-elu": ({"features": "elu"}, JOINT),
    "joint-learned": ({"features": "learned", "text_keys": "compressed"}, JOINT | {"heads": 4, "key_heads": 2}),
    # tokens of the model's own
    "registers": ({"eta": "ratio"}, {"registers": 3, "rope": True}),
    "registers-exact-fused": ({"text_keys": "compressed"}, {"registers": 3, "fused": True}),
    "registers-and-text": ({}, JOINT | {"registers": 3}),
    "text-and-registers": ({"eta": "ratio"}, JOINT | {"registers": 3, "text_first": True}),
    "registers-and-padding": ({"eta": "ratio"}, PADDED | {"registers": 3}),
    # a random start, as it is
    "random-start": ({"identity": False}, {"shake": False}),
    "joint-random-start": ({"identity": False}, JOINT | {"shake": False}),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    config, options = VARIANTS[request.param]
    return converted(config, **options)


@pytest.mark.parametrize(("h", "w"), [(3, 5), (4, 2)])
def test_a_variant_is_the_formula(variant, h, w):
    """Three samples: with padding, one of them has a prompt of nothing else."""
    check(variant, 3 if variant.padded else 2, h, w)


def test_registers_are_tokens_of_the_models_own_and_their_number_is_known():
    model = toy.Toy(blocks=1, joint=True, text_first=True, registers=3)
    (site,) = ec.plan(model, example_inputs=toy.inputs(text=5)).sites
    assert [s.kind for s in site.query_layout.segments] == ["text", "other", "image"]
    assert site.query_layout.segments[1].length == "3"


@pytest.fixture(scope="module", params=["edit", "mm-edit"])
def plain_and_half(request):
    return converted({}, **(JOINT if request.param == "mm-edit" else {"qk_norm": True}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_the_formula_as_the_teacher_is_to_its_own(plain_and_half, dtype):
    half = plain_and_half._replace(student=copy.deepcopy(plain_and_half.student).to(dtype))
    tokens, text_mask, output = seen_by(half, 2, 5, 7, dtype)
    assert output.dtype is dtype
    error = distance(output, torch.from_numpy(expected(half, tokens, text_mask, 5, 7)))
    with ec.teacher(half.student):
        _, _, taught = seen_by(half, 2, 5, 7, dtype)
        exact = half._replace(student=copy.deepcopy(half.student).double())
        _, _, formula = seen_by(exact, 2, 5, 7, torch.float64)
    assert error < 2 * distance(taught, formula)


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of the difference, relative to what is wanted."""
    return ((got.double() - wanted).square().mean() / wanted.square().mean()).sqrt().item()
