"""edit and mm-edit on the grid (t, h, w) of a video: against the formulas in float64, what frames see of each other, FLOPs."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import edit_compile as ec
import reference
import toy
from edit_compile.designs import find_design
from edit_compile.designs.base import QKV, Tokens
from edit_compile.designs.ops.conv_modules import ConvFusion, SpatialCompressor, TemporalKernel
from edit_compile.designs.ops.token_spans import on_images, sample_axis, to_image
from edit_compile.errors import ConfigError
from edit_compile.ir.site import Site
from edit_compile.ir.tokens import TokenLayout
from toy_clip import Clip, clip

TEMPORAL = ("none", "centred", "causal")
GRIDS = [(3, 5, 3), (4, 2, 4)]


@functools.cache
def planned(**options: Any) -> tuple[nn.Module, ec.Plan]:
    torch.manual_seed(0)
    model = toy.shaken(Clip(**options).eval())
    return model, ec.plan(model, example_inputs=clip((3, 4, 6), options.get("joint", False)))


def converted(config: dict[str, Any], *, shake: bool = True, **options: Any) -> nn.Module:
    model, plan = planned(**options)
    (site,) = plan.sites
    chosen = site.model_copy(update={"options": {**site.options, **config}})
    torch.manual_seed(0)
    student = ec.linearize(model, plan=plan.model_copy(update={"sites": (chosen,)}))
    return toy.shaken(student, seed=1, amount=0.2) if shake else student


def check(student: nn.Module, grid: tuple[int, ...], joint: bool) -> None:
    """To 1e-5 of the output's scale: the site's output against the formula on what the site was given."""
    seen: list[Any] = []
    site = student.block.attn
    handle = site.register_forward_hook(lambda module, args, output: seen.extend((args, output)))
    with torch.no_grad():
        student(**clip(grid, joint))
    handle.remove()
    options = SimpleNamespace(**{"text_keys": "full", **ec.plan_of(student).sites[0].options})
    for sample, output in enumerate(seen[1].numpy()):
        image, text = [x[sample].double().numpy() if x is not None else None for x in seen[0][:2]]
        wanted = reference.site(site, options, image, text, grid, rotary=True)
        np.testing.assert_allclose(output, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


MODES = [("none", 1), ("centred", 1), ("centred", 2), ("causal", 1), ("causal", 2)]


@pytest.mark.parametrize(("temporal", "stride"), MODES)
def test_edit_is_the_formula(temporal: str, stride: int):
    student = converted({"temporal": temporal, "temporal_stride": stride})
    for grid in GRIDS:
        check(student, grid, joint=False)


@pytest.mark.parametrize(
    ("eta", "text_keys", "mode"),
    [
        ("ratio", "full", MODES[0]),
        ("exact", "full", MODES[2]),
        ("exact", "compressed", MODES[3]),
        ("calibrated", "compressed", MODES[4]),
    ],
)
def test_mm_edit_is_the_formula(eta: str, text_keys: str, mode: tuple[str, int]):
    config = {"eta": eta, "text_keys": text_keys, "temporal": mode[0], "temporal_stride": mode[1]}
    student = converted(config, joint=True, text_first=eta == "exact")
    for grid in GRIDS:
        check(student, grid, joint=True)


@pytest.mark.parametrize("config", [{"key": "conv-fusion", "value": "plain"}, {"query": "plain"}, {"key": "plain", "value": "plain"}])
def test_a_variant_is_the_formula(config: dict[str, str]):
    student = converted({"temporal": "causal", **config}, joint=True)
    check(student, GRIDS[0], joint=True)


# ------------------------------------------------------------------ what frames see of each other


def modules(temporal: str, stride: int = 1) -> list[nn.Module]:
    torch.manual_seed(0)
    made = [ConvFusion(8, 2, temporal=temporal), SpatialCompressor(8, temporal=temporal, temporal_stride=stride)]
    return [toy.shaken(module.double()) for module in made]


@pytest.mark.parametrize(("temporal", "before", "after"), [("none", 0, 0), ("centred", 1, 1), ("causal", 2, 0)])
@pytest.mark.parametrize("frame", range(6))
def test_a_frame_sees_its_neighbours_and_nothing_else(temporal: str, before: int, after: int, frame: int):
    """Group norm included: perturbed so much that shared statistics would show."""
    x = torch.randn(1, 8, 6, 4, 5, dtype=torch.float64)
    other = x.clone()
    other[:, :, frame] = 100 * torch.randn(8, 4, 5, dtype=torch.float64)
    seen_by = [own for own in range(6) if own - before <= frame <= own + after]
    for module in modules(temporal):
        differs = (module(x) != module(other)).flatten(3).any(-1).any(1)[0]
        assert differs.nonzero().flatten().tolist() == seen_by


def test_thinned_frames_too_see_none_after_their_own():
    _, compress = modules("causal", stride=2)
    x = torch.randn(1, 8, 7, 4, 4, dtype=torch.float64)
    for frame in range(7):
        other = x.clone()
        other[:, :, frame:] += 10
        kept = (compress(x) == compress(other)).flatten(3).all(-1).all(1)[0]
        assert kept.tolist() == [2 * i < frame for i in range(4)]


@pytest.mark.parametrize("temporal", TEMPORAL)
def test_the_length_of_a_clip_changes_no_frame_but_its_last(temporal: str):
    x = torch.randn(2, 8, 7, 3, 4, dtype=torch.float64)
    for module in modules(temporal):
        torch.testing.assert_close(module(x)[:, :, :4], module(x[:, :, :5])[:, :, :4], atol=1e-12, rtol=0)


def test_frames_by_themselves_are_images():
    x = torch.randn(2, 8, 3, 4, 5, dtype=torch.float64)
    for module in modules("none"):
        for frame in range(3):
            torch.testing.assert_close(module(x)[:, :, frame], module(x[:, :, frame]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("temporal", TEMPORAL[1:])
def test_an_image_is_a_video_of_one_frame(temporal: str):
    x = torch.randn(2, 8, 4, 5, dtype=torch.float64)
    for module in modules(temporal):
        assert torch.equal(module(x), module(x[:, :, None])[:, :, 0])


@given(st.tuples(*[st.integers(1, 5)] * 3), st.sampled_from(MODES))
def test_untrained_they_are_the_identity_and_its_samples(sizes: tuple[int, int, int], mode: tuple[Any, int]):
    (temporal, stride), grid = mode, torch.empty(()).expand(sizes)
    x = torch.randn(2, math.prod(sizes), 8)
    assert torch.equal(on_images(ConvFusion(8, 4, temporal=temporal), x, grid), x)
    compressor = SpatialCompressor(8, temporal=temporal, temporal_stride=stride)
    sampled = x.unflatten(1, sizes)[:, ::stride, ::2, ::2].flatten(1, 3)
    torch.testing.assert_close(on_images(compressor, x, grid), sampled, atol=0, rtol=0)
    assert torch.equal(sample_axis(x, 1, grid, 0, 0, (stride, 2, 2)), sampled)


@pytest.mark.parametrize(("joint", "temporal"), [(False, "centred"), (True, "causal")])
def test_untrained_a_temporal_kernel_changes_nothing(joint: bool, temporal: str):
    given = clip((3, 5, 4), joint)
    with torch.no_grad():
        plain, student = (converted({"temporal": kind}, shake=False, joint=joint)(**given) for kind in ("none", temporal))
    torch.testing.assert_close(student, plain, atol=1e-6, rtol=0)


def test_with_a_random_start_every_kernel_is_random():
    module = TemporalKernel(8, "centred", identity=False)
    assert (module.weight != 0).all()
    assert not torch.equal(ConvFusion(8, 1, temporal="causal", identity=False).temporal.weight, TemporalKernel(8, "causal").weight)


# ------------------------------------------------------------------ FLOPs


C, HEADS, TEXT = 24, 2, 7
PLACES = tuple(f"{side}_{name}" for side in ("before", "after") for name in ("query", "key", "value"))
IMAGE, JOINT = TokenLayout.of(("image", "t*h*w")), TokenLayout.of(("image", "t*h*w"), ("text", "n"))


def site(layout: TokenLayout, grid_dims: int | None = 3) -> Site:
    sizes = {"heads": HEADS, "key_heads": HEADS, "head_dim": C // HEADS, "value_dim": C // HEADS}
    return Site("attention", "a", layout, layout, grid_dims, dict.fromkeys(PLACES, C), **sizes)


def counted(module: Any, grid: tuple[int, ...], others: int) -> int:
    """What the counter says of a design's taps and forward on random operands."""
    n = math.prod(grid)
    q, k, v, short_k, short_v = (torch.randn(1, HEADS, n + others, C // HEADS) for _ in range(5))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused kernel
        for tap in module.taps():
            m = tap.module(to_image(torch.randn(1, n, C), grid)).flatten(2).shape[2]
            if tap.stride:
                short_k, short_v = (torch.randn(1, HEADS, m + others, C // HEADS) for _ in range(2))
        kinds, lengths = ("image", "text")[: 1 + bool(others)], (n, others)[: 1 + bool(others)]
        original = QKV(q, k, v) if module.needs_original else None
        module(QKV(q, short_k, short_v, None, original), Tokens(kinds, lengths, grid))
    return counter.get_total_flops()


OPTIONS = [
    {},
    {"temporal": "centred"},
    {"temporal": "causal", "temporal_stride": 2},
    {"temporal": "centred", "key": "conv-fusion", "value": "plain"},
]


@settings(max_examples=30)
@given(
    st.tuples(st.integers(1, 6), st.integers(2, 6), st.integers(1, 6)),
    st.sampled_from(OPTIONS),
    st.sampled_from([("edit", {}), ("mm-edit", {}), ("mm-edit", {"text_keys": "compressed", "eta": "ratio"})]),
    st.sampled_from([2, 3, None]),
)
def test_flops_are_what_the_counter_counts(grid: tuple[int, ...], options: dict[str, Any], which: tuple[str, Any], grid_dims: int | None):
    design, own = find_design(which[0]), which[1]
    chosen = design.Options(**options, **own)
    joint = which[0] == "mm-edit"
    facts = site(JOINT if joint else IMAGE, grid_dims)
    sizes = grid[1:] if grid_dims == 2 else grid
    others = TEXT if joint else 0
    assert design.flops(facts, sizes, others, chosen) == counted(design(facts, chosen), sizes, others)


# ------------------------------------------------------------------ one configuration for images and videos


@pytest.mark.parametrize("design", ["edit", "mm-edit"])
def test_of_images_neither_names_nor_shapes_change(design: str):
    made, facts = find_design(design), site(JOINT if design == "mm-edit" else IMAGE, 2)
    plain, temporal = (made(facts, made.Options(**options)) for options in OPTIONS[::2])
    shapes = [{name: p.shape for name, p in module.state_dict().items()} for module in (plain, temporal)]
    assert shapes[0] == shapes[1]
    assert not any("temporal" in name for name in shapes[0])
    assert [tap.stride for tap in temporal.taps()] == [(), (2, 2), (2, 2)]


def test_of_videos_what_images_have_keeps_its_name():
    made = find_design("edit")
    image, video = (made(site(IMAGE, dims), made.Options(temporal="centred")).state_dict() for dims in (2, 3))
    assert set(image) < set(video)
    added = {f"{module}.temporal.{name}" for module in ("query", "key", "value") for name in ("weight", "bias")}
    assert set(video) - set(image) == added


def test_a_grid_that_is_told_in_the_call_may_have_time_or_not():
    made = find_design("edit")
    module = made(site(IMAGE, None), made.Options(temporal="causal", temporal_stride=2)).double()
    for tap in module.taps():
        thinned = (2, 2, 2) if tap.stride else (3, 4, 3)
        video = torch.randn(1, C, 3, 4, 3, dtype=torch.float64)
        assert tap.module(video).shape[2:] == thinned
        assert tap.module(video[:, :, 0]).shape[2:] == thinned[1:]
    x = torch.arange(36)
    for shape, sampled in [((3, 4, 3), x.view(3, 4, 3)[::2, ::2, ::2]), ((6, 6), x.view(6, 6)[::2, ::2])]:
        grid = torch.empty(()).expand(shape)
        assert torch.equal(sample_axis(x, 0, grid, 0, 0, (2, 2, 2)), sampled.flatten())
        assert Tokens(("image",), (36,), shape).thinned((2, 2, 2)).grid == sampled.shape


BAD_OPTIONS = [
    ({"temporal_stride": 2}, r"temporal_stride=2 needs temporal='centred' or 'causal', or frames would be lost"),
    (
        {"temporal": "causal", "temporal_stride": 2, "key": "plain", "value": "plain"},
        r"temporal_stride=2 and key='plain': only the compressor thins frames",
    ),
    ({"temporal": "centered"}, r"temporal='centered'"),
    ({"temporal": "causal", "temporal_stride": 3}, r"temporal_stride=3"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_impossible_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        ec.LinearizeConfig(**options)


def test_modules_refuse_what_options_do():
    with pytest.raises(ConfigError, match=r"temporal_stride=2 needs temporal='centred' or 'causal'"):
        SpatialCompressor(8, temporal_stride=2)
    with pytest.raises(ConfigError, match="temporal='none' has no kernel"):
        TemporalKernel(8, "none")


@pytest.mark.parametrize(("dims", "reason"), [(4, "the grid has 4 dimensions"), (1, "the grid has 1 dimensions"), (3, None), (None, None)])
def test_grids_of_other_dimensions_are_refused(dims: int | None, reason: str | None):
    verdict = find_design("edit").accepts(replace(site(IMAGE), grid_dims=dims), find_design("edit").Options())
    assert verdict.ok is (reason is None)
    assert reason is None or reason in verdict.reason


def test_a_video_trains_and_is_cheaper_than_its_teacher():
    student = converted({"temporal": "centred"}, joint=True)
    given = clip((3, 4, 6), joint=True)
    student.train()(**given).square().sum().backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if ".edit." in name}
    assert any(".temporal." in name for name in gradients)
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in gradients.values())
