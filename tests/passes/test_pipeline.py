"""pipeline: every pass in order, over the model and over each distinct site, each with a record; one of your own among them."""

from __future__ import annotations

import logging
import threading
import traceback
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import edit_compile as ec
import toy
from edit_compile.config import LinearizeConfig
from edit_compile.passes.analysis import ANALYSIS, Analysis
from edit_compile.passes.pipeline import Passes
from edit_compile.passes.planner import compile_plan, recompile
from edit_compile.passes.site_graph import SiteGraph
from edit_compile.passes.site_passes import SITE_PASSES


def names(passes):
    return [run.__name__ for run in passes]


def test_every_pass_runs_in_order_and_is_recorded(caplog):
    model = toy.Toy(blocks=3, by_hand=True)
    with caplog.at_level(logging.DEBUG, "edit_compile"):
        plan = compile_plan(model, toy.inputs(), LinearizeConfig()).plan
    over_model = [record for record in plan.passes if record.graph == "model"]
    assert [record.name for record in over_model] == names(ANALYSIS)
    assert over_model[0].count == 3
    over_sites = [record for record in plan.passes if record.graph != "model"]
    taken = [record for record in over_sites if record.name == "generate_method"]
    assert len(taken) == 1, "three equal blocks are one structure"
    assert names(SITE_PASSES) == [record.name for record in over_sites][-len(SITE_PASSES) :]
    assert all(record.nodes > 0 for record in plan.passes)
    logged = [record.getMessage() for record in caplog.records if record.name == "edit_compile.passes.pipeline"]
    assert [line.split(" ")[0] for line in logged][: len(ANALYSIS)] == names(ANALYSIS)


def test_what_no_pass_has_found_yet_is_not_there():
    with pytest.raises(AssertionError, match="classify_model has not run"):
        _ = Analysis(None, LinearizeConfig()).classified


def double_values(site: SiteGraph) -> int:
    """Multiply what a site returns by two."""
    output = site.graph.output_node()
    (result,) = output.args[0]
    with site.graph.inserting_before(output):
        doubled = site.graph.call_function(torch.mul, (result, 2))
    output.args = ((doubled,),)
    return 1


def test_a_pass_of_your_own_runs_where_it_is_put_and_is_recorded():
    model, inputs = toy.shaken(toy.Toy(blocks=1)), toy.inputs()
    passes = Passes().insert(double_values, before="generate_method")
    plain, changed = (ec.linearize(model, example_inputs=inputs, passes=p) for p in (None, passes))
    changed.load_state_dict(plain.state_dict())
    outputs = []
    for student in (plain, changed):
        student.blocks[0].attn.register_forward_hook(lambda module, args, output: outputs.append(output))
        with torch.no_grad():
            student(**inputs)
    torch.testing.assert_close(outputs[1], 2 * outputs[0], atol=0, rtol=0)
    plan = ec.plan_of(changed)
    assert "double_values" in [record.name for record in plan.passes]
    with pytest.raises(ec.PlanError, match="made with the pass 'double_values', which is not among those given"):
        recompile(model, plan)
    assert recompile(model, plan, passes).plan == plan


class Mapped(toy.ToyAttention):
    """With a function that it is given, and settings that refer to themselves."""

    def projected(self, tokens):
        query, key, value = super().projected(tokens)
        return query, key, self.function(value)


@pytest.mark.parametrize(
    ("functions", "structures"),
    [
        ((torch.tanh, torch.tanh), 1),
        ((torch.tanh, torch.sigmoid), 2),
        ((partial(F.gelu, approximate="tanh"), partial(F.gelu, approximate="none")), 2),
    ],
)
def test_sites_that_are_given_other_functions_are_other_structures(functions, structures):
    model, settings = toy.Toy(), SimpleNamespace()
    settings.own = settings
    for block, function in zip(model.blocks, functions, strict=True):
        block.attn.__class__, block.attn.function, block.attn.settings = Mapped, function, settings
    plan = ec.plan(model, example_inputs=toy.inputs())
    assert len({record.graph for record in plan.passes if record.graph != "model"}) == structures


def test_a_block_that_runs_twice_is_left_as_it_is():
    model = toy.Toy(blocks=3)
    model.blocks[2] = model.blocks[0]
    first, alone, again = ec.plan(model, example_inputs=toy.inputs())
    assert first.reason == again.reason == "one module, with one set of weights, is this site and others"
    assert (first.action, alone.action, again.action) == ("keep", "edit", "keep")


def test_plans_that_are_made_at_once_leave_torch_as_it_was():
    before, plans = dict(vars(ShapeEnv)), []
    threads = [threading.Thread(target=lambda: plans.append(ec.plan(toy.Toy(blocks=1), example_inputs=toy.inputs()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert plans[0] == plans[1]
    assert vars(ShapeEnv) == before


def forgets_to_count(site):
    pass


def fails(site):
    raise ValueError("no\nmore")


def uses_before_it_is_made(site):
    output = site.graph.output_node()
    with site.graph.inserting_before(output):
        late = site.graph.call_function(torch.neg, output.args[0])
    output.prev.prev.args = (late,)
    return 1


def drops_tokens(site):
    output = site.graph.output_node()
    with site.graph.inserting_before(output):
        output.args = ((site.graph.call_function(torch.narrow, (output.args[0][0], 1, 0, 3)),),)
    return 1


@pytest.mark.parametrize(
    ("run", "before", "message"),
    [
        (forgets_to_count, "generate_method", r"^the pass 'forgets_to_count' returns None on blocks\.0\.attn; a pass returns a count"),
        (forgets_to_count, "decide_sites", "^the pass 'forgets_to_count' returns None on model; "),
        (fails, "generate_method", r"^the pass 'fails' fails on blocks\.0\.attn: ValueError: no at .*test_pipeline\.py:\d+ \([^\n]*$"),
        (uses_before_it_is_made, "generate_method", r"^the pass 'uses_before_it_is_made' fails on blocks\.0\.attn: RuntimeError: "),
        (drops_tokens, "generate_method", r"rewritten, the site returns tensors of shapes \[\[2, 3, 24\]\], not \[\[2, 35, 24\]\]"),
    ],
)
def test_a_pass_of_your_own_that_breaks_something_is_named(run, before, message):
    with pytest.raises(ec.EditCompileError, match=message):
        ec.linearize(toy.Toy(blocks=1), example_inputs=toy.inputs(), passes=Passes().insert(run, before=before))


def test_a_pass_has_a_name():
    with pytest.raises(ec.ConfigError, match="a pass is a function with a name, which the plan records, not 3"):
        Passes().insert(3, before="audit_site")


@pytest.mark.parametrize(("before", "message"), [("nowhere", "no pass 'nowhere'; there are: canonicalize_model, .*audit_site")])
def test_a_place_that_is_not_there_is_refused(before, message):
    with pytest.raises(ec.ConfigError, match=message):
        Passes().insert(double_values, before=before)


def test_a_pass_is_put_in_once():
    passes = Passes().insert(double_values, before="replace_core")
    with pytest.raises(ec.ConfigError, match="a pass named 'double_values' is there already"):
        passes.insert(double_values, before="insert_taps")


def broken(site: SiteGraph) -> int:
    """Divide by the string "zero"."""
    output = site.graph.output_node()
    (result,) = output.args[0]
    with site.graph.inserting_before(output):
        output.args = ((site.graph.call_function(explode, (result,)),),)
    return 1


def explode(x):
    if isinstance(x, fx.Proxy) or x.device.type == "meta" or isinstance(x, torch._subclasses.FakeTensor):
        return x
    raise ZeroDivisionError("as asked")


def test_tracebacks_show_the_lines_of_generated_code():
    passes = Passes().insert(broken, before="generate_method")
    student = ec.linearize(toy.Toy(blocks=1), example_inputs=toy.inputs(), passes=passes)
    with pytest.raises(ZeroDivisionError) as caught:
        student(**toy.inputs())
    shown = "".join(traceback.format_tb(caught.tb))
    assert "explode(" in shown
    assert "return _run(self, image, " in shown
