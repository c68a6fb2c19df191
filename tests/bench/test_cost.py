"""FLOPs against hand-computed cases, the paper's formulas (arXiv 2503.16726) and the order of growth; parameters; break-even."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math

import pytest
import torch
from torch import nn

import edit_compile as ec
import families
import toy
from edit_compile.adapters.inputs import default_sizes, inputs_for_size
from edit_compile.api import repeated_blocks
from edit_compile.bench import Cost, count_flops
from edit_compile.bench.conversion_cost import break_even_tokens
from edit_compile.bench.roofline import Roofline
from edit_compile.bench.sized_inputs import InputMaker
from edit_compile.passes.capture import meta_copy, meta_inputs


class Hand(nn.Module):
    """A Linear, softmax attention, a convolution: every kind of work that is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 10, bias=True)
        self.conv = nn.Conv2d(3, 8, 3, padding=1, groups=1)

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.linear(x).unflatten(-1, (2, 5)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q), self.conv(image)


def test_count_is_the_hand_computed_one():
    with torch.device("meta"):
        found = count_flops(Hand(), {"x": torch.empty(4, 7, 6), "image": torch.empty(1, 3, 11, 13)}, ["linear", "conv"])
    linear = 2 * (4 * 7) * 6 * 10
    attention = 2 * 2 * (4 * 2) * 7 * 7 * 5
    conv = 2 * (11 * 13) * 8 * 3 * 9
    assert found.parts == {"linear": linear, "conv": conv}
    assert found.total == linear + attention + conv


def test_edit_site_is_the_formula():
    """The paper's parts one by one, for C channels, H heads of D, h x w tokens, text left out."""
    model = toy.Toy(channels=24, heads=2, blocks=1).eval()
    student = meta_copy(ec.linearize(model, ec.LinearizeConfig(reduction=4), toy.inputs()))
    c, d, h, w = 24, 12, 8, 6
    n, m, hidden = h * w, h * w // 4, 24 // 4
    projections = 4 * 2 * n * c * c
    fusion = 2 * n * hidden * c * 9 + 2 * n * c * hidden
    compressors = 2 * (2 * m * c * 9)
    attention = 2 * (2 * m * d * d + 2 * n * d * d)  # its normaliser is no matrix product
    counted = count_flops(student, meta_inputs(toy.inputs(1, 2 * h, 2 * w)), ["blocks.0.attn"])
    assert counted.parts["blocks.0.attn"] == projections + fusion + compressors + attention
    with ec.teacher(student):
        counted = count_flops(student, meta_inputs(toy.inputs(1, 2 * h, 2 * w)), ["blocks.0.attn"])
    assert counted.parts["blocks.0.attn"] == projections + 4 * n * n * c


OPTIONS = {
    "query": ("conv-fusion", "plain"),
    "projection": ("compressor", "conv-fusion", "plain"),
    "eta": ("ratio", "exact", "calibrated"),
    "text_keys": ("full", "compressed"),
}
JOINT = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())]
IMAGE_ONLY = [options for options in JOINT if options["eta"] == "exact" and options["text_keys"] == "full"]


def with_options(plan: ec.Plan, query: str, projection: str, **options: str) -> ec.Plan:
    """The plan with other options of the designs at every site; image-only attention has no text options."""
    chosen = {"query": query, "key": projection, "value": projection, **options}
    sites = (site.model_copy(update={"options": site.options | {k: v for k, v in chosen.items() if k in site.options}}) for site in plan)
    return plan.model_copy(update={"sites": tuple(sites)})


@functools.cache
def planned(joint: bool):
    model = toy.Toy(blocks=1, joint=joint).eval()
    return model, ec.plan(model, example_inputs=toy.inputs(text=4 if joint else None))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("joint", "options"),
    [*((True, options) for options in JOINT), *((False, options) for options in IMAGE_ONLY)],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else ("joint" if value else "image"),
)
def test_cost_is_linear_in_image_tokens(joint, options):
    """Twice the image tokens, twice the FLOPs of a rewritten site; the teacher's attention grows fourfold."""
    model, plan = planned(joint)
    text = 4 if joint else None
    student = meta_copy(ec.linearize(model, plan=with_options(plan, **options)))
    sides = (32, 64, 128)  # 32 * 64 image tokens and more: text and what does not grow are small beside them
    path = "blocks.0.attn"
    counts = [count_flops(student, meta_inputs(toy.inputs(1, 128, 2 * side, text)), [path]).parts[path] for side in sides]
    with ec.teacher(student):
        teacher = [count_flops(student, meta_inputs(toy.inputs(1, 128, 2 * side, text)), [path]).parts[path] for side in sides]
    for less, more in itertools.pairwise(counts):
        assert more / less == pytest.approx(2, rel=0.01)
    steps = [more - less for less, more in itertools.pairwise(counts)]
    assert steps[1] == 2 * steps[0]  # exactly affine
    projections = [8 * 64 * side * 24 * 24 for side in sides]
    attention = [count - linear for count, linear in zip(teacher, projections, strict=True)]
    for less, more in itertools.pairwise(attention):
        assert more / less == pytest.approx(4, rel=0.02)


@pytest.fixture(scope="module")
def demo():
    return ec.linearize(ec.load_model("demo/mm-dit").model)


def test_report_on_a_model_with_weights(demo):
    report = ec.cost(demo)
    assert [(c.height, c.image, c.text) for c in report.costs] == [(32, 256, 32), (64, 1024, 32), (128, 4096, 32)]
    assert report.parameters + report.added == sum(p.numel() for p in demo.parameters())
    assert report.added == sum(p.numel() for name, p in demo.named_parameters() if ".edit." in name)
    ratios = [cost.ratio for cost in report.costs]
    assert ratios == sorted(ratios)
    assert ratios[-1] > 4 * ratios[0]
    assert all(p.device.type == "cpu" for p in demo.parameters())
    for cost in report.costs:
        assert cost.saved == sum(site.before - site.after for site in cost.sites)  # the rest of the model is as it was


def test_weights_of_its_own_change_nothing(demo):
    student = copy.deepcopy(demo)
    ec.unshare(student)
    assert ec.cost(student, [(32, 32)]).costs == ec.cost(demo, [(32, 32)]).costs


def test_equal_blocks_need_run_only_once(demo):
    structure = meta_copy(demo)
    inputs = meta_inputs(inputs_for_size(structure, 48, 64).inputs)
    paths = [site.path for site in ec.plan_of(demo).sites]
    assert count_flops(structure, inputs, paths, repeated_blocks(structure)) == count_flops(structure, inputs, paths)
    assert "forward" not in vars(structure.transformer_blocks[1])


def test_text_of_equal_blocks_counts_where_only_the_block_that_ran_tells_its_length(demo, monkeypatch):
    """As of pipelines without an adapter."""
    rates = {"product": 1e12, "softmax": 5e11, "depthwise": 1e11, "bandwidth": 1e10, "overhead": 1e-6}
    rates = Roofline(device="a machine", threads=1, torch_version="2", dtype="float32", **rates)
    known = ec.cost(demo, [(64, 64)], rates=rates).costs
    at = InputMaker.at
    monkeypatch.setattr(InputMaker, "at", lambda *given: dataclasses.replace(at(*given), text=None))
    unknown = ec.cost(demo, [(64, 64)], rates=rates).costs
    assert unknown[0].text is None
    assert unknown[0].sites == known[0].sites


def test_sizes_that_cannot_be_drawn_say_why(demo):
    report = ec.cost(demo, [(32, 32), (160, 32), (33, 32)])
    assert len(report.costs) == 1
    assert report.break_even_tokens is None
    assert "positions (pos_embed_max_size=64) end at 128 px" in report.errors["160 x 32"]
    assert "multiples of 2" in report.errors["33 x 32"]


def cost(image: int, saved: float) -> Cost:
    return Cost(0, 0, image, 0, before=10**9, after=10**9 - int(saved), sites=())


def test_break_even_is_where_the_parabola_crosses():
    """With the paper's costs, 4 N^2 C against 20 C^2 N / reduction: at 5 C / reduction."""
    channels, reduction = 64, 4
    costs = [cost(n, 4 * n * n * channels - 20 * channels**2 * n / reduction) for n in (16, 64, 256)]
    assert break_even_tokens(costs) == 5 * channels / reduction == break_even_tokens(costs[:2])
    assert break_even_tokens(costs[:1]) is None
    assert break_even_tokens([cost(n, n * n) for n in (16, 64)]) == 0
    assert break_even_tokens([cost(n, -n * n) for n in (16, 64)]) is None


def test_break_even_of_a_real_structure(demo):
    report = ec.cost(demo)
    n = report.break_even_tokens
    assert n is not None
    assert 0.5 * 5 * 96 / 4 < n < 2 * 5 * 96 / 4
    side = math.ceil(math.sqrt(n) / 2) * 4  # even grids
    above = ec.cost(demo, [(side + 4, side + 4), (side - 8, side - 8)]).costs
    assert above[0].ratio < 1 < above[1].ratio


@pytest.mark.parametrize("family", ["sd3", "pixart", "flux", "dit", "vit"])
def test_inputs_for_a_size_run_and_fill_the_grid(family):
    model, _ = families.FAMILIES[family]()
    height, width = default_sizes(model)[0]
    if family not in ("dit", "vit"):
        height, width = 64, 96
    if family == "dit":
        height = width = 64
    picture = inputs_for_size(model, height, width, batch=2, text=7, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        output = model(**picture.inputs)
    rows, columns = picture.grid
    if family == "flux":
        assert output[0].shape[1] == rows * columns
    elif family != "vit":
        assert output[0].shape[-2:] == (2 * rows, 2 * columns)
    assert (height / rows, width / columns) == ((16, 16))


def test_families_refuse_sizes_they_do_not_support():
    dit, vit = families.dit()[0], families.vit()[0]
    with pytest.raises(ec.GridError, match="only square images"):
        inputs_for_size(dit, 64, 96)
    with pytest.raises(ec.GridError, match=r"it was built for 80 x 112 px"):
        inputs_for_size(vit, 112, 80)
    with pytest.raises(ec.GridError, match="end at 320 px"):
        inputs_for_size(families.sd3()[0], 1024, 64)
    with pytest.raises(ec.NoExampleInputsError, match="no example inputs are known for Toy"):
        inputs_for_size(toy.Toy(), 64, 64)
