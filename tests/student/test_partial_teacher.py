"""The teacher with some of the sites left as students: `teacher(student, students=[...])`."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import edit_compile as ec
import toy
from edit_compile.distillation.train.features import captured
from edit_compile.student.site import converted_sites

TEXT = 5
WIDE, TALL = toy.inputs(2, 8, 12, TEXT, 3), toy.inputs(2, 12, 8, TEXT, 4)
FIRST, SECOND, LAST = (f"blocks.{n}.attn" for n in range(3))


@pytest.fixture(scope="module")
def base():
    return toy.shaken(toy.Toy(blocks=3, joint=True).eval())


@pytest.fixture(scope="module")
def student(base):
    student = ec.linearize(base, example_inputs=toy.inputs(text=TEXT))
    toy.shaken(nn.ModuleList(converted_sites(student).values()), amount=0.1)
    return student


@torch.no_grad()
def call(model, inputs):
    return model(**inputs)


def mixed(base, student, *paths):
    """A model of which only some sites were converted, with the student's weights there."""
    made = ec.linearize(base, ec.LinearizeConfig(include=paths), toy.inputs(text=TEXT))
    state = {name: tensor for name, tensor in student.state_dict().items() if name.startswith(tuple(f"{path}." for path in paths))}
    assert not made.load_state_dict(state, strict=False).unexpected_keys
    return made


@pytest.mark.slow
@pytest.mark.parametrize("paths", [[FIRST], [SECOND], [FIRST, LAST]])
def test_it_is_the_model_of_which_only_these_sites_were_converted(base, student, paths):
    expected = mixed(base, student, *paths)
    for inputs in (WIDE, TALL):
        with ec.teacher(student, students=paths) as model:
            found = call(model, inputs)
        torch.testing.assert_close(found, call(expected, inputs), atol=1e-6, rtol=0)
        assert not torch.allclose(found, call(base, inputs), atol=1e-3)
        assert not torch.allclose(found, call(student, inputs), atol=1e-3)


def test_all_of_them_or_none_are_the_student_and_the_teacher(base, student):
    with ec.teacher(student, students=[FIRST, SECOND, LAST]):
        assert torch.equal(call(student, WIDE), call(student, WIDE))
    with ec.teacher(student, students=()):
        torch.testing.assert_close(call(student, WIDE), call(base, WIDE), atol=1e-6, rtol=0)


def test_of_two_blocks_the_inner_one_says_which(student):
    outputs = {}
    for name, paths in {"first": [FIRST], "last": [LAST], "none": []}.items():
        with ec.teacher(student, students=paths):
            outputs[name] = call(student, WIDE)
    with ec.teacher(student, students=[FIRST]):
        with ec.teacher(student, students=[LAST]):
            assert torch.equal(call(student, WIDE), outputs["last"])
        with ec.teacher(student):
            assert torch.equal(call(student, WIDE), outputs["none"])
        assert torch.equal(call(student, WIDE), outputs["first"])
        found = []
        thread = threading.Thread(target=lambda: found.append(call(student, WIDE)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], call(student, WIDE))


def test_each_sites_output_can_be_captured_and_the_grid_be_stated(base, student):
    with ec.teacher(student, students=[SECOND]), captured(student) as features:
        call(student, WIDE)
    assert list(features) == [FIRST, SECOND, LAST]
    with ec.teacher(student, students=[SECOND]), pytest.raises(ec.GridError), ec.grid(student, 5, 5):
        call(student, WIDE)


def test_gradients_reach_the_student_sites_alone_also_where_blocks_run_again(student):
    def gradients():
        student.zero_grad()
        with ec.teacher(student, students=[SECOND]):
            output = student(**{**WIDE, "x": WIDE["x"].clone().requires_grad_()})
        output.square().mean().backward()
        return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    without = gradients()
    student.gradient_checkpointing = True
    again = gradients()
    student.gradient_checkpointing = False
    assert without
    assert all(name.startswith(f"{SECOND}.") for name in without)
    assert without.keys() == again.keys()
    for name, gradient in without.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-4)


def test_after_unshare_the_rest_has_its_original_weights(base):
    student = ec.linearize(base, example_inputs=toy.inputs(text=TEXT))
    toy.shaken(nn.ModuleList(converted_sites(student).values()), amount=0.1)
    with ec.teacher(student, students=[FIRST]):
        expected = call(student, WIDE)
    ec.unshare(student)
    with torch.no_grad():
        student.out.weight.mul_(2)
    with ec.teacher(student, students=[FIRST]):
        torch.testing.assert_close(call(student, WIDE), expected, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_compiled_blocks_follow(student):
    eager = {}
    for paths in ((FIRST,), (LAST,)):
        with ec.teacher(student, students=paths):
            eager[paths] = call(student, WIDE)
    torch._dynamo.reset()
    ec.compile(student, backend="eager")
    for paths, expected in eager.items():
        with ec.teacher(student, students=paths):
            torch.testing.assert_close(call(student, WIDE), expected, atol=1e-5, rtol=0)
    torch._dynamo.reset()


def test_what_is_no_converted_site_is_refused(student):
    with (
        pytest.raises(ec.EditCompileError, match=r"no site at 'blocks.7.attn' is converted; near it: blocks"),
        ec.teacher(student, ["blocks.7.attn"]),
    ):
        pass
