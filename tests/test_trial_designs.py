"""Designs from outside the package, end to end: planned, converted, audited, saved, loaded, compiled, distilled."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

import edit_compile as ec
import toy
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.designs import unregister
from edit_compile.distillation.data import Batch
from edit_compile.distillation.data.seeding import noise_for
from trial_designs import TRIALS, ConvFFN, VideoLinear, Window


@pytest.fixture(autouse=True)
def registered():
    for design in TRIALS:
        ec.register(design)
    yield
    for design in TRIALS:
        unregister(design.name)


class ToyVideo(nn.Module):
    """Clips (B, 3, T, H, W) with patches of 1 x 2 x 2 to clips of the same shape."""

    def __init__(self, channels: int = 24, blocks: int = 2) -> None:
        super().__init__()
        self.patch, self.out = nn.Conv3d(3, channels, (1, 2, 2), stride=(1, 2, 2)), nn.Linear(channels, 12)
        options: dict[str, Any] = {"heads": 2, "text_first": False, "qk_norm": True}
        self.blocks = nn.ModuleList(toy.ToyBlock(channels, **options) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.patch(x)
        b, _, t, h, w = y.shape
        tokens = y.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens, _ = block(tokens, None, None, None)
        y = self.out(tokens).view(b, t, h, w, 2, 2, 3).permute(0, 6, 1, 2, 4, 3, 5)
        return y.reshape(b, 3, t, 2 * h, 2 * w)


def clip(batch=2, t=3, h=10, w=14):
    return {"x": torch.randn(batch, 3, t, h, w, generator=torch.Generator().manual_seed(0))}


def window(joint: bool):
    return toy.shaken(toy.Toy(joint=joint).eval()), toy.inputs(text=5 if joint else None), ec.LinearizeConfig(design="window", side=4)


def video():
    return toy.shaken(ToyVideo().eval()), clip(), ec.LinearizeConfig(design="video-linear")


def conv_ffn():
    return toy.shaken(toy.Toy(joint=True).eval()), toy.inputs(text=5), ec.LinearizeConfig(rules=[ec.Rule("*.ff", "conv-ffn")])


CASES = {"window": lambda: window(False), "window, joint": lambda: window(True), "video": video, "conv-ffn": conv_ffn}
OTHER_SIZE = {
    "window": toy.inputs(1, 6, 18),
    "window, joint": toy.inputs(1, 6, 18, 3),
    "video": clip(1, 5, 6, 8),
    "conv-ffn": toy.inputs(1, 6, 18, 3),
}


def converted(case):
    torch.manual_seed(0)
    model, inputs, config = CASES[case]()
    return model, inputs, ec.linearize(model, config, example_inputs=inputs)


def shaken(student):
    """Move what is the student's own; the rest is the original's too."""
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))


@pytest.mark.parametrize("case", CASES)
def test_it_is_planned_converted_and_audited(case):
    model, inputs, student = converted(case)
    plan = ec.plan_of(student)
    rewritten = [site for site in plan if site.rewritten]
    assert [site.path for site in rewritten] == [f"blocks.{i}.{'ff' if case == 'conv-ffn' else 'attn'}" for i in range(2)]
    assert {site.kind for site in rewritten} == {"feed_forward" if case == "conv-ffn" else "attention"}
    assert ec.audit(student).sites == (0 if case == "conv-ffn" else 2)
    with torch.no_grad():
        for given in (inputs, OTHER_SIZE[case]):
            assert student(**given).shape == given["x"].shape
            with ec.teacher(student):
                assert torch.equal(student(**given), model(**given))


@pytest.mark.parametrize("case", CASES)
def test_it_is_saved_and_loaded(case, tmp_path):
    model, inputs, student = converted(case)
    shaken(student)
    ec.save(student, tmp_path)
    loaded = ec.load(tmp_path, model)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs), student(**inputs))
    assert ec.plan_of(loaded) == ec.plan_of(student)


def graphs(compile_blocks, model, case):
    """How many graphs a model's blocks need for the example's size and another, and its outputs."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compile_blocks(counter)
    outputs = [model(**given) for given in (CASES[case]()[1], OTHER_SIZE[case])]
    torch._dynamo.reset()
    return counter.frame_count, outputs


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_it_compiles_to_as_many_graphs_as_the_original(case):
    model, inputs, student = converted(case)
    expected = [student(**given) for given in (inputs, OTHER_SIZE[case])]
    of_student, outputs = graphs(lambda backend: ec.compile(student, backend=backend), student, case)
    of_model, _ = graphs(lambda backend: [b.compile(backend=backend, dynamic=True, fullgraph=True) for b in model.blocks], model, case)
    assert of_student <= of_model
    for found, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


class Clips:
    """Random latents and conditions by position."""

    concurrent = True

    def __init__(self, case):
        self.case, self.skipped = case, {}

    def check(self, height, width):
        pass

    def batch(self, request):
        shape = (3, 3, request.height, request.width) if self.case == "video" else (3, request.height, request.width)
        text = {"text": noise_for(request.positions, (5, 6), 2, request.split)} if self.case in ("window, joint", "conv-ffn") else {}
        return Batch(noise_for(request.positions, shape, 1, request.split), text)

    def decode(self, latents):
        return None


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_is_distilled_for_two_steps(case, tmp_path):
    _, _, student = converted(case)
    recipe = ec.Recipe.model_validate(
        {
            "model": "toy",
            "stages": [{"resolution": [10, 14], "steps": 2, "global_batch_size": 2, "lr": 0.01, "warmup_steps": 0}],
            "validation": {"samples": 2, "batch_size": 2, "timestep_bins": 1},
            "samples": {"count": 1, "steps": 1},
            "trackers": [],
            "log_every": 1,
        }
    )
    rows = []
    result = ec.distill(
        recipe,
        tmp_path,
        student=student,
        source=Clips(case),
        denoise=lambda model, x, times, conditions: model(x=x, **conditions),
        schedule=NoiseSchedule("rectified-flow"),
        report=rows.append,
    )
    assert [row["total"] for row in rows] == [1, 2]
    assert result.after.total > 0 or case == "conv-ffn"  # the feed-forward design begins as its teacher
    assert (tmp_path / "edit_compile.json").is_file()


def test_the_window_is_softmax_within_windows():
    facts = ec.Site(
        "attention", "a", ec.TokenLayout.of(("image", "n")), ec.TokenLayout.of(("image", "n")), 2, heads=2, head_dim=4, value_dim=4
    )
    h, w, k = 6, 7, 4
    q, key, value = (torch.randn(1, 2, h * w, 4, dtype=torch.float64) for _ in range(3))
    y = Window(facts, Window.Options())(ec.QKV(q, key, value), ec.Tokens(("image",), (h * w,), (h, w)))
    for row in range(h):
        for column in range(w):
            near = [r * w + c for r in range(h) for c in range(w) if r // k == row // k and c // k == column // k]
            i = row * w + column
            wanted = F.scaled_dot_product_attention(q[:, :, [i]], key[:, :, near], value[:, :, near])
            torch.testing.assert_close(y[:, :, [i]], wanted, atol=1e-12, rtol=1e-12)


def test_the_feed_forward_design_begins_as_its_teacher():
    model, inputs, student = converted("conv-ffn")
    with torch.no_grad():
        torch.testing.assert_close(student(**inputs), model(**inputs), atol=1e-5, rtol=1e-5)
    shaken(student)
    with torch.no_grad():
        assert not torch.allclose(student(**inputs), model(**inputs), atol=1e-3)


def test_a_rule_for_attention_and_one_for_feed_forward_networks():
    rules = [ec.Rule("*.attn", "window", {"side": 3}), ec.Rule("blocks.0.ff", "conv-ffn")]
    plan = ec.plan(toy.Toy(), ec.LinearizeConfig(rules=rules), toy.inputs())
    assert {site.path: site.action for site in plan if site.rewritten} == {
        "blocks.0.attn": "window",
        "blocks.1.attn": "window",
        "blocks.0.ff": "conv-ffn",
    }
    assert plan["blocks.0.attn"].options == {"side": 3}


def test_rules_of_both_kinds_over_the_same_paths():
    keep_first = [ec.Rule("blocks.0.ff", "keep"), ec.Rule("*", "conv-ffn"), ec.Rule("*", "window")]
    plan = ec.plan(toy.Toy(), ec.LinearizeConfig(rules=keep_first), toy.inputs())
    actions = {site.path: site.action for site in plan}
    assert actions.pop("blocks.0.ff", "keep") == "keep"
    assert actions == {"blocks.0.attn": "window", "blocks.1.attn": "window", "blocks.1.ff": "conv-ffn"}
    wrong_kind = ec.plan(toy.Toy(blocks=1), ec.LinearizeConfig(rules=[ec.Rule("*.attn", "conv-ffn")]), toy.inputs())
    assert wrong_kind["blocks.0.attn"].reason == "the design 'conv-ffn' is for sites of kind feed_forward, this one is of kind attention"


class Rolls(toy.ToyAttention):
    """Every key is its neighbour's: no key can be left out before that."""

    def projected(self, tokens):
        q, k, v = super().projected(tokens)
        return q, k.roll(1, 1), v


def test_a_refusal_of_equal_sites_names_none_of_them_and_one_of_a_plan_names_its_own():
    model, inputs = toy.Toy(blocks=2), toy.inputs()
    plan = ec.plan(model, example_inputs=inputs)
    for block in model.blocks:
        block.attn.__class__ = Rolls
    reasons = {site.reason for site in ec.plan(model, example_inputs=inputs)}
    assert len(reasons) == 1
    assert reasons.pop().startswith("aten.roll.default (roll) mixes image tokens between projection and attention")
    with pytest.raises(ec.RewriteError, match=r"^blocks\.0\.attn: aten\.roll\.default \(roll\) mixes image tokens"):
        ec.linearize(model, plan=plan)


def test_passes_are_passes():
    with pytest.raises(ec.ConfigError, match=r"passes is a Passes, .*, not a list"):
        ec.plan(toy.Toy(), example_inputs=toy.inputs(), passes=[])


class Liar(Window):
    """A window softmax that claims less than it does."""

    name = "liar"

    @classmethod
    def allows(cls, rows, columns, grid, options):
        return max(rows, columns) <= 4


def test_a_design_that_does_more_than_it_allows_is_found_out_wherever_it_is_used(tmp_path):
    ec.register(Liar)
    try:
        model, inputs = toy.Toy(blocks=1), toy.inputs()
        honest = ec.linearize(model, ec.LinearizeConfig(design="window"), inputs)
        plan = ec.plan_of(honest)
        lying = plan.model_copy(update={"sites": tuple(site.model_copy(update={"action": "liar"}) for site in plan)})
        ec.save(honest, tmp_path)
        index = tmp_path / "edit_compile.json"
        index.write_text(index.read_text().replace('"window"', '"liar"'))
        for use in (
            lambda: ec.plan(model, ec.LinearizeConfig(design="liar"), inputs),
            lambda: ec.linearize(model, ec.LinearizeConfig(design="liar"), inputs),
            lambda: ec.linearize(model, plan=lying),
        ):
            with pytest.raises(
                ec.AuditError, match=r"the design 'liar' is not what it says: softmax attention .* multiplies 16 image tokens by 16"
            ):
                use()
        with pytest.raises(ec.EditCompileError, match="the design 'liar' is not what it says"):
            ec.load(tmp_path, model)
    finally:
        unregister("liar")


@pytest.mark.parametrize(("design", "grid"), [(Window, (6, 10)), (VideoLinear, (3, 5, 7)), (ConvFFN, (5, 7))])
def test_flops_are_in_closed_form(design, grid):
    places = ("after_key", "after_value", "before_output")
    layout = ec.TokenLayout.of(("image", "n"))
    facts = ec.Site(design.kind, "a", layout, layout, len(grid), dict.fromkeys(places, 24), heads=2, head_dim=12, value_dim=12)
    assert design.flops(facts, grid, 0, design.Options()) < 10**9 * math.prod(grid)
