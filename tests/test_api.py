"""plan, linearize, teacher, compile: on toys, where every claim can be checked quickly."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import edit_compile as ec
import toy
from edit_compile.student.site import converted_sites
from edit_compile.torch_internals import is_lazy_copy

pytestmark = pytest.mark.usefixtures("compiled_once")

TEXT = 5


@pytest.fixture(scope="module")
def model():
    return toy.shaken(toy.Toy(joint=True, rope=True).eval())


@pytest.fixture(scope="module")
def example():
    return toy.inputs(text=TEXT)


@pytest.fixture(scope="module")
def plan(model, example):
    return ec.plan(model, example_inputs=example)


@pytest.fixture
def student(model, plan):
    return ec.linearize(model, plan=plan)


def call(model, height=10, width=14, batch=2, seed=3):
    return model(**toy.inputs(batch, height, width, TEXT, seed))


def test_plan_says_what_and_why(plan):
    assert [site.path for site in plan.sites] == ["blocks.0.attn", "blocks.1.attn"]
    site = plan.sites[0]
    assert site.action == "mm-edit"
    assert [s.kind for s in site.query_layout.segments] == ["image", "text"]
    assert site.query_layout == site.key_layout
    assert site.grid is not None
    assert len(site.grid.sizes) == 2


def test_plan_survives_json(model, plan):
    again = ec.Plan.from_json(plan.to_json())
    assert again == plan
    with torch.no_grad():
        torch.manual_seed(0)
        a = call(ec.linearize(model, plan=plan))
        torch.manual_seed(0)
        b = call(ec.linearize(model, plan=again))
    assert torch.equal(a, b)


def test_the_original_is_left_as_it_was(model, plan):
    before = copy.deepcopy(model.state_dict())
    expected = call(model)
    student = ec.linearize(model, plan=plan)
    toy.shaken(nn.ModuleList(converted_sites(student).values()))
    student.to(torch.bfloat16)
    assert type(model.blocks[0].attn) is toy.ToyAttention
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(call(model), expected)


def test_untouched_weights_are_shared_and_names_kept(model, student):
    assert isinstance(student, toy.Toy)
    assert isinstance(student.blocks[0].attn, toy.ToyAttention)
    originals = model.state_dict()
    added = {k for k in student.state_dict() if k not in originals}
    assert all(".attn.edit." in k for k in added)
    assert set(originals) <= set(student.state_dict())
    assert is_lazy_copy(student.out.weight)
    assert not is_lazy_copy(student.blocks[0].attn.to_q.weight)


def test_teacher_is_the_original_bit_for_bit_even_after_training(model, student):
    toy.shaken(nn.ModuleList(converted_sites(student).values()))
    assert not torch.equal(call(student), call(model))
    with ec.teacher(student) as original:
        assert torch.equal(call(original), call(model))
    assert not torch.equal(call(student), call(model))


def test_nothing_selected_changes_nothing(model, example):
    config = ec.LinearizeConfig(exclude=("blocks.1.*",))
    student = ec.linearize(model, config, example)
    assert list(converted_sites(student)) == ["blocks.0.attn"]
    assert type(student.blocks[1].attn) is toy.ToyAttention


def test_untrained_text_rows_are_the_teachers(model, example):
    """With full text keys, text queries attend as before until training starts."""
    student = ec.linearize(model, ec.LinearizeConfig(text_keys="full"), example_inputs=example)
    rows = {}

    def keep(name):
        def hook(module, args, output):
            rows[name] = output[:, -TEXT:]

        return hook

    for name, m in (("teacher", model), ("student", student)):
        handle = m.blocks[0].attn.register_forward_hook(keep(name))
        call(m)
        handle.remove()
    torch.testing.assert_close(rows["student"], rows["teacher"], atol=1e-5, rtol=0)


def test_attention_by_hand_is_found(example):
    model = toy.shaken(toy.Toy(joint=True, by_hand=True).eval())
    fused = toy.Toy(joint=True).eval()
    fused.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    a = ec.linearize(model, example_inputs=example)
    torch.manual_seed(0)
    b = ec.linearize(fused, example_inputs=example)
    torch.testing.assert_close(call(a), call(b), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_the_student_about_what_it_costs_the_teacher(student, dtype):
    half = copy.deepcopy(student).to(dtype)
    inputs = {k: v.to(dtype) for k, v in toy.inputs(2, 10, 14, TEXT, 3).items()}

    def error():
        got, expected = half(**inputs), call(student)
        assert got.dtype is dtype
        return (got.float() - expected).square().mean().sqrt()

    loss = error()
    with ec.teacher(half), ec.teacher(student):
        assert loss < 3 * error()


def test_deepcopy_is_independent(student):
    twin = copy.deepcopy(student)
    expected = call(student)
    toy.shaken(nn.ModuleList(converted_sites(twin).values()))
    assert torch.equal(call(student), expected)
    with ec.teacher(twin):
        assert not torch.equal(call(student), call(twin))
    assert torch.equal(call(student), expected)


def test_gradient_checkpointing_gives_the_same_gradients_for_two_shapes_of_equal_count(student):
    toy.shaken(nn.ModuleList(converted_sites(student).values()))

    def gradients(checkpointing):
        student.gradient_checkpointing = checkpointing
        student.zero_grad()
        (call(student, 8, 12).square().mean() + call(student, 12, 8).square().mean()).backward()
        return {k: p.grad.clone() for k, p in student.named_parameters() if p.grad is not None}

    without, with_it = gradients(False), gradients(True)
    assert without.keys() == with_it.keys()
    assert any(".edit." in k for k in without)
    for name, gradient in without.items():
        torch.testing.assert_close(with_it[name], gradient, atol=1e-6, rtol=1e-4)


RESOLUTIONS = [(8, 12), (10, 14), (12, 20), (6, 10), (14, 18), (16, 22)]
SOME = 3  # of them, where compiling is slow and later ones would add no graph


def graphs(model, resolutions=RESOLUTIONS):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for height, width in resolutions:
            call(model, height, width)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_whole_compile_needs_no_more_graphs_and_agrees(model, student):
    def compiled(m):
        return torch.compile(m, dynamic=True, fullgraph=True, backend="eager")

    assert graphs(compiled(student)) <= graphs(compiled(model))
    torch._dynamo.reset()
    wrapped = compiled(student)
    with torch.no_grad():
        for height, width in RESOLUTIONS[:SOME]:
            torch.testing.assert_close(call(wrapped, height, width), call(student, height, width), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_regional_compile_needs_no_more_graphs_than_the_untouched_model_nor_for_more_blocks(example):
    def of_teacher(blocks):
        model = toy.Toy(blocks=blocks, joint=True, rope=True).eval()
        for block in model.blocks:
            block.compile(dynamic=True, fullgraph=True, backend="eager")
        return graphs(model, RESOLUTIONS[:2])

    def of_student(blocks):
        model = toy.Toy(blocks=blocks, joint=True, rope=True).eval()
        return graphs(ec.compile(ec.linearize(model, example_inputs=example), backend="eager"), RESOLUTIONS[:2])

    two = of_student(2)
    assert 0 < two <= of_teacher(2)
    assert of_student(4) == two


def test_export_of_the_student(student):
    inputs = toy.inputs(2, 10, 14, TEXT, 3)
    auto = {k: dict.fromkeys(range(v.ndim), torch.export.Dim.AUTO) for k, v in inputs.items()}
    program = torch.export.export(student, (), inputs, dynamic_shapes=auto, strict=False)
    other = toy.inputs(2, 12, 18, TEXT, 4)
    torch.testing.assert_close(program.module()(**other), student(**other), atol=1e-5, rtol=1e-5)


def test_converting_twice_is_refused(student, example):
    with pytest.raises(ec.PlanError, match="converted already"):
        ec.plan(student, example_inputs=example)


def test_a_block_alone_says_that_the_grid_is_missing(student):
    image = torch.zeros(1, 35, 24)
    with pytest.raises(ec.GridError, match=r"blocks\.0\.attn.*outside the model's forward"):
        student.blocks[0].attn(image)


def test_no_attention_shows_what_was_looked_at():
    with pytest.raises(ec.PlanError, match="Sequential has no attention"):
        ec.plan(nn.Sequential(nn.Linear(3, 3)), example_inputs={"input": torch.zeros(2, 3)})


def test_globs_that_match_nothing_list_the_sites(model, example):
    with pytest.raises(ec.PlanError, match=r"'nowhere' matches no site; there are: blocks\.0\.attn"):
        ec.plan(model, ec.LinearizeConfig(include=("nowhere",)), example)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"design": "sana2"}, r"unknown design 'sana2'; did you mean sana\? there are: edit, mm-edit"),
        ({"reductoin": 4}, r"unknown option 'reductoin'; did you mean reduction\? there are: design, .*reduction"),
        ({"reduction": 0}, "reduction=0"),
        ({"value": "plain"}, "compress both or neither"),
    ],
)
def test_bad_options_name_the_good_ones(options, message):
    with pytest.raises(ec.ConfigError, match=message):
        ec.LinearizeConfig(**options)


def test_reduction_that_does_not_divide(model, example):
    with pytest.raises(ec.PlanError, match="reduction=7 does not divide the 24 channels"):
        ec.linearize(model, ec.LinearizeConfig(reduction=7), example)


def test_arguments_the_capture_did_not_have_are_refused():
    student = ec.linearize(toy.Toy().eval(), example_inputs=toy.inputs())
    site = student.blocks[0].attn
    with ec.grid(student, 5, 7), pytest.raises(ec.RewriteError, match=r"blocks\.0\.attn.*text is not None.*Convert again"):
        site(torch.zeros(1, 35, 24), torch.zeros(1, 5, 24))


@pytest.mark.parametrize("padded", [False, True])
def test_a_mask_that_is_missing_or_one_too_many_is_named(padded):
    student = ec.linearize(toy.shaken(toy.Toy(joint=True).eval()), example_inputs=toy.inputs(text=TEXT, padded=padded))
    words = f"mask is {'None' if padded else 'not None'}"
    with pytest.raises(ec.RewriteError, match=rf"blocks\.0\.attn: was converted for inputs without this: {words}"):
        student(**toy.inputs(text=TEXT, padded=not padded))
