"""Every design by name, held to what users do with any of them; a design that is added is held to it, too."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import edit_compile as ec
import packed_model
import toy
import toy_distill
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.demo import models
from edit_compile.designs import design_names, find_design
from edit_compile.distillation import distill
from edit_compile.student.site import converted_sites
from families import FAMILIES
from toy_clip import Clip, clip

Inputs = dict[str, Tensor]
CHANNELS, TEXT = 24, 5


class Layout(NamedTuple):
    """A toy of one block, and how to call it on a grid.

    Attributes:
        grids: the example's; one that nothing divides alike; one smaller than a window.
    """

    make: Callable[[], nn.Module]
    call: Callable[..., Inputs]
    grids: tuple[tuple[int, ...], ...]


def _picture(grid: tuple[int, ...], text: int | None = None, batch: int = 2, padded: bool = False) -> Inputs:
    return toy.inputs(batch, 2 * grid[0], 2 * grid[1], text, padded=padded)


GROUPED: dict[str, Any] = {"blocks": 1, "heads": 4, "key_heads": 2, "qk_norm": True, "rope": True}
LAYOUTS = {
    "image": Layout(lambda: toy.Toy(CHANNELS, **GROUPED), _picture, ((6, 10), (5, 3), (1, 2))),
    "text": Layout(
        lambda: toy.Toy(CHANNELS, joint=True, text_first=True, **GROUPED),
        lambda grid, batch=2: _picture(grid, TEXT, batch, padded=True),
        ((6, 10), (5, 3), (1, 2)),
    ),
    "video": Layout(Clip, lambda grid, batch=2: clip(grid, False, batch), ((3, 4, 6), (2, 5, 3), (1, 1, 2))),
    "video and text": Layout(lambda: Clip(joint=True), lambda grid, batch=2: clip(grid, True, batch), ((3, 4, 6), (2, 5, 3), (1, 1, 2))),
}
NOT_FOR = {  # layouts that a design refuses
    "edit": ("text", "video and text"),
    "mm-edit": ("image", "video"),
    "linear-mm-alpha": ("image", "video"),
}
WINDOWS = ("clear", "local-linear")  # that may hold a whole small grid, where the attention is the teacher's
CASES = [(design, layout) for design in design_names() for layout in LAYOUTS if layout not in NOT_FOR.get(design, ())]
# Videos, whose captures take longest, are left to `make test-all`; test_video has their formulas.
MARKED = [pytest.param(*case, marks=[pytest.mark.slow] * ("video" in case[1])) for case in CASES]
ONE_EACH = [next(case for case in reversed(CASES) if case[0] == design and "video" not in case[1]) for design in design_names()]


@functools.cache
def original(layout: str) -> nn.Module:
    torch.manual_seed(0)
    return toy.shaken(LAYOUTS[layout].make().eval())


@functools.cache
def converted(design: str, layout: str, **options: Any) -> nn.Module:
    """A student whose inserted parameters have moved from their start."""
    config, example = ec.LinearizeConfig(design=design, **options), LAYOUTS[layout].call(LAYOUTS[layout].grids[0])
    model = original(layout)
    torch.manual_seed(0)
    student = ec.linearize(model, config, example)
    for name, parameter in student.named_parameters():
        if ".edit." in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return student


def calls(layout: str) -> list[Inputs]:
    """The example's grid, and others in batches of other sizes."""
    first, *more = LAYOUTS[layout].grids
    return [LAYOUTS[layout].call(first), *(LAYOUTS[layout].call(grid, batch=batch) for grid, batch in zip(more, (3, 1), strict=True))]


@pytest.mark.parametrize(("design", "layout"), [(design, layout) for design, layouts in NOT_FOR.items() for layout in layouts])
def test_what_a_design_is_not_for_it_refuses_in_words(design: str, layout: str):
    plan = ec.plan(original(layout), ec.LinearizeConfig(design=design), LAYOUTS[layout].call(LAYOUTS[layout].grids[0]))
    assert not plan.rewritten
    assert all(site.reason and site.reason in str(plan).replace("\n", " ") for site in plan.sites if site.kind == "attention")


@pytest.mark.parametrize(("design", "layout"), MARKED)
@torch.no_grad()
def test_it_runs_at_any_size_with_its_teacher_inside(design: str, layout: str):
    student, model = converted(design, layout), original(layout)
    assert design in [site.action for site in ec.plan_of(student).rewritten]
    assert design in str(ec.plan_of(student))
    for given in calls(layout):
        wanted, found = model(**given), student(**given)
        assert found.shape == wanted.shape
        assert found.isfinite().all()
        assert (found - wanted).abs().max() > 1e-5 or (design in WINDOWS and len(given["x"]) != 2)
        with ec.teacher(student):
            torch.testing.assert_close(student(**given), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("design", "layout"), MARKED)
@torch.no_grad()
def test_one_sample_does_not_depend_on_the_rest_of_its_batch(design: str, layout: str):
    student, given = converted(design, layout), calls(layout)[1]
    alone = {name: x[1:2] for name, x in given.items()}
    torch.testing.assert_close(student(**given)[1:2], student(**alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("design", sorted({design for design, layout in CASES if layout == "text"}))
@torch.no_grad()
def test_padding_of_text_has_no_effect(design: str):
    student, given = converted(design, "text"), calls("text")[0]
    other = given | {"text": torch.where(given["text_mask"][..., None], given["text"], 9.0)}
    assert not torch.equal(given["text"], other["text"])
    torch.testing.assert_close(student(**other), student(**given), atol=1e-5, rtol=0)
    counting = given | {"text_mask": torch.ones_like(given["text_mask"])}
    assert (student(**counting) - student(**given)).abs().max() > 1e-5


@pytest.mark.parametrize(("design", "layout"), MARKED)
def test_gradients_reach_every_inserted_parameter(design: str, layout: str):
    student = converted(design, layout)
    student.zero_grad()
    student(**calls(layout)[0]).square().sum().backward()
    inserted = {name: p.grad for name, p in student.named_parameters() if ".edit." in name}
    assert not [
        name for name, gradient in inserted.items() if gradient is None or not gradient.isfinite().all() or not gradient.abs().sum()
    ]


@pytest.mark.parametrize(("design", "layout"), MARKED)
@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(design: str, layout: str, tmp_path):
    student, given = converted(design, layout), calls(layout)[1]
    ec.save(student, tmp_path)
    loaded = ec.load(tmp_path, original(layout))
    assert ec.plan_of(loaded) == ec.plan_of(student)
    assert torch.equal(loaded(**given), student(**given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("design", "layout"), MARKED)
@torch.no_grad()
def test_half_precision_is_near_single(design: str, layout: str, dtype: torch.dtype):
    student, given = converted(design, layout), calls(layout)[0]
    half = {name: x.to(dtype) if x.is_floating_point() else x for name, x in given.items()}
    found, wanted = copy.deepcopy(student).to(dtype)(**half), student(**given)
    assert found.dtype is dtype
    assert found.isfinite().all()
    # The median: where a query is nearly orthogonal to all keys, linear attention divides by next to nothing.
    error = (found.float() - wanted).abs().median() / wanted.abs().mean()
    assert error < (0.03 if dtype is torch.bfloat16 else 0.005)


@torch.no_grad()
def counted(model: nn.Module, given: Inputs) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused kernel
        model(**given)
    return counter.get_total_flops()


def facts(planned: ec.SitePlan, layout: str, grid: tuple[int, ...]) -> ec.Site:
    """What the compiler should find out about a site of a toy."""
    heads, key_heads = (2, 2) if "video" in layout else (4, 2)
    sides = {f"{side}_{name}": CHANNELS for side in ("before", "after") for name in ("query", "key", "value")}
    narrow = {f"after_{name}": CHANNELS * key_heads // heads for name in ("key", "value")}
    channels = sides | narrow | {"before_hidden": CHANNELS, "after_hidden": 2 * CHANNELS, "before_output": 2 * CHANNELS}
    sizes = {"heads": heads, "key_heads": key_heads, "head_dim": CHANNELS // heads, "value_dim": CHANNELS // heads}
    return ec.Site(planned.kind, planned.path, planned.query_layout, planned.key_layout, len(grid), channels, **sizes)


@pytest.mark.parametrize(("design", "layout"), MARKED)
def test_what_it_counts_is_what_the_counter_counts(design: str, layout: str):
    check_flops(converted(design, layout), layout)


def check_flops(student: nn.Module, layout: str) -> None:
    """All of a student's FLOPs are the teacher's without softmax attention, and what designs say of their sites."""
    others = TEXT if "text" in layout else 0
    for grid, given in zip(LAYOUTS[layout].grids, calls(layout), strict=True):
        expected = counted(original(layout), given)
        for planned in ec.plan_of(student).rewritten:
            chosen = find_design(planned.action)
            own = chosen.flops(facts(planned, layout, grid), grid, others, chosen.Options(**planned.options))
            softmax = 4 * CHANNELS * (math.prod(grid) + others) ** 2 if planned.kind == "attention" else 0
            expected += len(given["x"]) * (own - softmax)
        assert counted(student, given) == expected


ABLATION = {  # of EDiT's query, key and value: ConvFusion, compressor, the model's own
    "CF/SC/SC": {"query": "conv-fusion", "key": "compressor", "value": "compressor"},
    "CF/CF/-": {"query": "conv-fusion", "key": "conv-fusion", "value": "plain"},
    "-/SC/SC": {"query": "plain", "key": "compressor", "value": "compressor"},
    "CF/-/-": {"query": "conv-fusion", "key": "plain", "value": "plain"},
    "separable": {"query": "conv-fusion", "key": "compressor", "value": "compressor", "separable": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("row", ABLATION)
@pytest.mark.parametrize(("design", "layout"), [case for case in MARKED if case.values[0] in ("edit", "mm-edit")])
@torch.no_grad()
def test_the_rows_of_the_papers_ablation(design: str, layout: str, row: str):
    student = converted(design, layout, **ABLATION[row])
    (site,) = ec.plan_of(student).rewritten
    assert {name: site.options[name] for name in ABLATION[row]} == ABLATION[row]
    inserted = {name.split(".edit.")[1].split(".")[0] for name, _ in student.named_parameters() if ".edit." in name}
    assert inserted == {name for name, kind in ABLATION[row].items() if kind not in ("plain", True)}
    check_flops(student, layout)
    for given in calls(layout):
        assert student(**given).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(("design", "layout"), ONE_EACH)
@torch.no_grad()
def test_compiled_it_needs_no_more_graphs_than_the_original(design: str, layout: str):
    teacher, student, given = copy.deepcopy(original(layout)), copy.deepcopy(converted(design, layout)), calls(layout)[:2]
    of_teacher, of_student = CompileCounter(), CompileCounter()
    torch._dynamo.reset()
    teacher.blocks[0].compile(backend=of_teacher, dynamic=True, fullgraph=True)
    ec.compile(student, backend=of_student)
    for call in given:
        teacher(**call)
        torch.testing.assert_close(student(**call), converted(design, layout)(**call), atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
    assert 0 < of_student.frame_count <= of_teacher.frame_count


# ------------------------------------------------------------------ several images in one sequence


class PackedBlock(nn.Module):
    """Attention and a feed-forward network, each in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = packed_model.Block()
        self.ff = nn.Sequential(nn.Linear(packed_model.WIDTH, 64), nn.GELU(), nn.Linear(64, packed_model.WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x)
        return x + self.ff(x)


class PackedImages(packed_model.Packed):
    """Tells its grids by position ids."""

    def __init__(self) -> None:
        super().__init__(PackedBlock)

    def forward(self, image: Tensor, image_ids: Tensor, text: Tensor | None = None) -> Tensor:
        ids = image_ids.sum(-1)
        return self.run(image, text, ids if text is None else F.pad(ids, (text.shape[1], 0)))


def packed_call(*grids: tuple[int, int], text: bool, batch: int = 2) -> Inputs:
    ids = torch.cat([packed_model.positions(*grid, t=float(i)) for i, grid in enumerate(grids)])
    given = {"image": packed_model.latents(*grids, batch=batch), "image_ids": ids}
    return given | ({"text": packed_model.words(7, batch)} if text else {})


@pytest.mark.slow
@pytest.mark.parametrize("design", design_names())
@torch.no_grad()
def test_each_of_several_images_has_its_own_grid(design: str):
    torch.manual_seed(0)
    text = "text" not in NOT_FOR.get(design, ())
    model = PackedImages().eval()
    config = ec.LinearizeConfig(design=design, **({"radius": 3} if design in WINDOWS else {}))
    student = ec.linearize(model, config, packed_call((6, 10), (8, 4), text=text))
    for name, parameter in student.named_parameters():
        if ".edit." in name:
            parameter += 0.1 * torch.randn_like(parameter)
    for grids in (((6, 10), (8, 4)), ((5, 4), (3, 7), (4, 4)), ((5, 7),)):
        given = packed_call(*grids, text=text, batch=len(grids))
        assert packed_model.same_as_stated(student, given, *(grids if len(grids) > 1 else grids[0])).isfinite().all()
        with ec.teacher(student):
            torch.testing.assert_close(student(**given), model(**given), atol=1e-5, rtol=0)


# ------------------------------------------------------------------ training


@pytest.mark.slow
@pytest.mark.parametrize("design", design_names())
def test_a_layerwise_fit_and_a_step_of_distillation_move_what_was_inserted(design: str, tmp_path):
    torch.manual_seed(0)
    base = toy.Toy(blocks=1, joint="text" not in NOT_FOR.get(design, ())).eval()
    student = ec.linearize(base, ec.LinearizeConfig(design=design), toy.inputs(text=toy_distill.TEXT))
    toy.shaken(nn.ModuleList(site.edit for site in converted_sites(student).values()), amount=0.01)  # one may begin as its teacher
    before = {name: p.detach().clone() for name, p in student.named_parameters() if ".edit." in name}
    stage = {"resolution": [12, 16], "steps": 2, "global_batch_size": 2, "lr": 1e-3, "warmup_steps": 0}
    layerwise = {"steps": 2, "global_batch_size": 2, "lr": 1e-3, "warmup_steps": 0}
    result = distill(
        toy_distill.recipe(stages=[stage], layerwise=layerwise, validation={"samples": 4, "batch_size": 4, "timestep_bins": 2}),
        tmp_path,
        student=student,
        source=toy_distill.ToySource(),
        denoise=toy_distill.denoise,
        schedule=NoiseSchedule("rectified-flow"),
    )
    after = dict(result.student.named_parameters())
    assert not [name for name, old in before.items() if torch.equal(after[name], old)]
    assert all(parameter.isfinite().all() for parameter in after.values())
    given = toy.inputs(2, 12, 16, toy_distill.TEXT)
    with torch.no_grad():
        assert torch.equal(ec.load(tmp_path, base)(**given), result.student(**given))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["demo/mm-dit", "demo/dit", "demo/video-dit"])
@pytest.mark.parametrize("design", design_names())
def test_the_trained_demo_models_are_distilled_by_recipe(design: str, model: str, tmp_path):
    """Where it takes none of a model's sites, the error says so."""
    side, frames = (24, {"frames": 8}) if model == "demo/video-dit" else (32, {})
    step = {"steps": 1, "global_batch_size": 2, "lr": 1e-3}
    recipe = {
        "model": model,
        "convert": {"design": design},
        "data": {"kind": "moving-shapes" if frames else "shapes"},
        "layerwise": step,
        "stages": [{"resolution": side, **step, **frames}],
        "validation": {"samples": 4, "batch_size": 4, "timestep_bins": 2},
    }
    plan = ec.plan(model, ec.LinearizeConfig(design=design))
    if not plan.rewritten:
        with pytest.raises(ec.PlanError, match="can be converted"):
            ec.linearize(model, ec.LinearizeConfig(design=design))
        return
    result = ec.distill(ec.Recipe.model_validate(recipe), tmp_path)
    assert math.isfinite(result.after.total)
    loaded = ec.load(tmp_path)
    assert {site.path: site.action for site in ec.plan_of(loaded)} == {site.path: site.action for site in plan}
    for caption_model in (loaded, result.student):
        assert models.sample(caption_model, [""], steps=1).isfinite().all()


# ------------------------------------------------------------------ models of the libraries

TINY = ("sd3-dual", "flux", "pixart", "qwen-image", "wan")


@pytest.mark.slow
@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("design", design_names())
@torch.no_grad()
def test_the_families_are_converted(design: str, family: str):
    model, inputs = FAMILIES[family]()
    plan = ec.plan(model, ec.LinearizeConfig(design=design), inputs)
    refusals = {site.reason for site in plan if site.action == "keep"}
    assert all(refusals)
    if not plan.rewritten:
        assert design in NOT_FOR
        return
    student = ec.linearize(model, plan=plan)
    for name, parameter in student.named_parameters():
        if ".edit." in name:
            parameter += 0.1 * torch.randn_like(parameter)
    wanted, found = model(**inputs)[0], student(**inputs)[0]
    assert found.shape == wanted.shape
    assert found.isfinite().all()
    assert not torch.equal(found, wanted)
    with ec.teacher(student):
        assert torch.equal(student(**inputs)[0], wanted)
    assert ec.audit(student).sites
