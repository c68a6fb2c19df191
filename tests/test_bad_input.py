"""What users get wrong: every mistake is an EditCompileError that says what, where and what to do, and changes nothing."""

from __future__ import annotations

import contextlib
import copy
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import edit_compile as ec
import toy
from edit_compile.ir.input_spec import decode, encode
from edit_compile.ir.position_ids import grids_of_ids
from edit_compile.ir.size_expressions import evaluator

RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # whose time it is depends on the machine's load


@pytest.fixture(scope="module")
def model():
    return toy.shaken(toy.Toy(joint=True).eval())


@pytest.fixture(scope="module")
def plan(model):
    return ec.plan(model, example_inputs=toy.inputs(text=5))


@pytest.fixture(scope="module")
def student(model, plan):
    return ec.linearize(model, plan=plan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: ec.plan(3), "int is neither a torch.nn.Module nor a pipeline"),
        (lambda m, p: ec.linearize("sd3"), "sd3 does not exist; give a folder"),
        (lambda m, p: ec.plan("demo/nothing"), "no demo model 'nothing'; there are: "),
        (lambda m, p: ec.plan(m, {"reduction": 4}, toy.inputs(text=5)), "config is a LinearizeConfig, not a dict"),
        (
            lambda m, p: ec.plan(m, example_inputs=torch.zeros(2, 3)),
            "keyword arguments of the model's forward, a dict by name, not a Tensor",
        ),
        (lambda m, p: ec.plan(m, example_inputs={}), "Toy cannot be captured"),
        (lambda m, p: ec.plan(m, example_inputs={"y": torch.zeros(2, 3)}), "Toy cannot be captured"),
        (lambda m, p: ec.plan(m, example_inputs={"x": torch.zeros(2, 5, 10, 14)}), "Toy cannot be captured"),
        (lambda m, p: ec.plan(m, example_inputs=toy.inputs(batch=1, text=5)), "the example inputs have batch 1"),
        (lambda m, p: ec.plan(m), "no example inputs are known for Toy"),
        (lambda m, p: ec.linearize(m, plan={}), "plan is a Plan, as edit_compile.plan"),
        (lambda m, p: ec.linearize(nn.Linear(2, 2), plan=p), "the plan is for a Toy"),
        (lambda m, p: ec.teacher(m).__enter__(), "Toy is not converted; edit_compile.linearize"),
        (lambda m, p: ec.compile(m), "Toy is not converted"),
        (lambda m, p: ec.plan_of(None), "NoneType is not converted"),
        (lambda m, p: ec.unshare(m), "Toy is not converted"),
        (lambda m, p: ec.save(m, "nowhere"), "Toy is not converted"),
        (lambda m, p: ec.grid(m, 2, 2).__enter__(), "Toy is not converted"),
    ],
)
def test_wrong_types_and_models(model, plan, call, message):
    with pytest.raises(ec.EditCompileError, match=message):
        call(model, plan)


@pytest.mark.parametrize("size", [(0, 3), (3, -1), (2.5, 2), ("a", 2)])
def test_what_is_no_grid(student, size):
    with pytest.raises(ec.GridError, match="two positive whole numbers"), ec.grid(student, *size):
        pass


def test_a_grid_that_is_not_the_inputs(student):
    with ec.grid(student, 7, 5), pytest.raises(ec.GridError, match="stated as 7 x 5, but the inputs have 5 x 7 image tokens"):
        student(**toy.inputs(text=5))


def test_unsharing_what_is_not_there(student):
    with pytest.raises(ec.ConfigError, match=r"'nothing' matches no weight outside the converted sites; there are: patch\.weight"):
        ec.unshare(student, ["nothing"])


def test_calls_without_the_tensor_that_tells_the_grid(student):
    with pytest.raises(ec.GridError, match="called without any tensor"):
        student()
    with pytest.raises(ec.GridError, match="called with x=NoneType"):
        student(text=torch.zeros(2, 5, 6))
    with pytest.raises(ec.GridError, match="x has 2 dimensions"):
        student(x=torch.zeros(2, 3))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(model, plan, value):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.blocks[1].ff[0].bias[3] = value
    with pytest.raises(ec.RewriteError, match=r"the weight blocks\.1\.ff\.0\.bias holds NaN or infinity"):
        ec.linearize(broken, plan=plan)


@settings(RELAXED, max_examples=25)
@given(height=st.integers(4, 23), width=st.integers(4, 23), batch=st.integers(1, 3), text=st.integers(1, 7))
def test_any_size_runs_and_odd_ones_round_down_as_the_model_does(model, student, height, width, batch, text):
    inputs = toy.inputs(batch, height, width, text)
    with torch.no_grad():
        assert student(**inputs).shape == model(**inputs).shape


names = st.sampled_from([*ec.LinearizeConfig.model_fields, "reductoin", ""])
values = st.one_of(st.none(), st.booleans(), st.integers(-2, 9), st.text(max_size=5), st.sampled_from(["plain", "compressor", "ratio"]))


@settings(RELAXED)
@given(st.dictionaries(names, values, max_size=4))
def test_options_are_accepted_or_refused_by_name(options):
    refused = None
    try:
        ec.LinearizeConfig(**options)
    except ec.ConfigError as error:
        refused = str(error)
    assert refused is None or any(name in refused for name in options)


@settings(RELAXED)
@given(st.text(alphabet="s12+-*/() %.^_x", max_size=12))
def test_size_expressions_are_arithmetic_or_refused(text):
    with contextlib.suppress(ec.GridError, ZeroDivisionError):
        assert isinstance(evaluator(text, {"s1"})({"s1": 7}), int)


@settings(RELAXED)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), data=st.data())
def test_position_ids_are_a_whole_grid_or_refused(rows, columns, data):
    h, w = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    ids = torch.stack([torch.zeros_like(h), h, w], -1).flatten(0, 1).float()
    assert grids_of_ids(ids, "ids", (1, 2)) == ((rows, columns),)
    order = data.draw(st.permutations(range(len(ids))))
    if order not in (sorted(order), sorted(order)[::-1]) and min(rows, columns) > 2:
        with pytest.raises(ec.GridError, match="not full grids in row-major order"):
            grids_of_ids(ids[order], "ids")
    broken = ids.clone()
    broken[0, 1] = float("nan")
    with pytest.raises(ec.GridError, match="holds no positions"):
        grids_of_ids(broken, "ids")


leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.lists(st.integers(0, 4), max_size=3).map(torch.zeros))
nested = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6
)


@settings(RELAXED)
@given(nested)
def test_example_inputs_survive_as_data(value):
    description = encode(value)
    assert encode(decode(json.loads(json.dumps(description)))) == description


def test_example_inputs_whose_keys_would_become_strings_are_refused():
    with pytest.raises(ec.PlanError, match="dicts among the inputs have strings for keys, not 0"):
        encode({"a": {0: torch.zeros(1)}})


@settings(RELAXED)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=4), lambda x: st.lists(x) | st.dictionaries(st.text(max_size=6), x), max_leaves=5
    )
)
def test_what_is_no_plan(junk):
    with pytest.raises(ec.PlanError, match="not a plan"):
        ec.Plan.from_json(json.dumps(junk))
