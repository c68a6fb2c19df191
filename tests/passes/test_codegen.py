"""codegen: a forward with the original's signature, that refuses what the graph was not made for."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from edit_compile.errors import RewriteError
from edit_compile.passes.capture import Capture, Source
from edit_compile.passes.codegen import generate_forward

X, Y = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])


def site(kind, arguments, run, outputs=None):
    """A module of class `kind` with a generated forward, whose graph is `run` on the flattened arguments and the grid.

    Args:
        outputs: an example of what it returns, for its nesting; a single tensor unless given.
    """
    graph = fx.Graph()
    leaves = pytree.tree_leaves(dict(arguments))
    inputs = [graph.placeholder(f"p{i}") for i in range(len(leaves))] + [graph.placeholder("edit_grid")]
    found = run(graph, *inputs)
    graph.output(tuple(pytree.tree_leaves(found)))
    spec = pytree.tree_structure(found)
    sources = {f"p{i}": Source("input", f"p{i}") for i in range(len(leaves))}
    captured = Capture(SimpleNamespace(call_spec=SimpleNamespace(out_spec=spec)), sources)
    original = kind()
    forward = generate_forward(graph, captured, original, arguments)
    module = type(f"Linear{kind.__name__}", (kind,), {"forward": forward})()
    module.edit_teacher_is_on, module.edit_current_grid = lambda: False, lambda: torch.empty(3, 5)
    module.edit_teacher_forward, module.edit_path = lambda *args, **kwargs: (args, kwargs), "blocks.7.attn"
    return module


def added(graph, *inputs):
    """The sum of the tensors among the inputs: all of them, in these graphs, but the grid."""
    total = inputs[0]
    for other in inputs[1:-1]:
        total = graph.call_function(torch.add, (total, other))
    return total


def first(graph, x, *_):
    return graph.call_function(torch.mul, (x, 2))


class Plain(nn.Module):
    def forward(self, x: Tensor, y: Tensor | None = None, scale: float = 1.0, flag: bool = False) -> Tensor: ...


class KeywordOnly(nn.Module):
    def forward(self, x, *, y, scale=2.0): ...


class Variable(nn.Module):
    def forward(self, x, *rest, y=None, **more): ...


class PositionalOnly(nn.Module):
    def forward(self, x, /, y): ...


class Nested(nn.Module):
    def forward(self, x, pair=None, named=None): ...


@pytest.mark.parametrize("kind", [Plain, KeywordOnly, Variable, PositionalOnly, Nested])
def test_the_signature_is_the_originals(kind):
    module = site(kind, {"x": X}, first)
    assert inspect.signature(type(module).forward) == inspect.signature(kind.forward)


def test_arguments_go_by_place_or_by_name():
    module = site(Plain, {"x": X, "y": Y}, added)
    for result in (module(X, Y), module(X, y=Y), module(y=Y, x=X), module(X, Y, 1.0, flag=False)):
        assert torch.equal(result, X + Y)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        module(y=Y)
    keyword = site(KeywordOnly, {"x": X, "y": Y}, added)
    assert torch.equal(keyword(X, y=Y), X + Y)
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        keyword(X, Y)
    assert torch.equal(site(PositionalOnly, {"x": X, "y": Y}, added)(X, Y), X + Y)


def test_the_graph_gets_the_grid():
    module = site(Plain, {"x": X}, lambda graph, x, grid: graph.call_function(torch.ones_like, (grid,)))
    assert module(X).shape == (3, 5)


def test_entries_of_a_variable_keyword_parameter_are_read_from_it():
    module = site(Variable, {"x": X, "rope": Y}, added)
    assert torch.equal(module(X, rope=Y), X + Y)
    assert torch.equal(module(X, rope=Y, unused=None), X + Y)


def test_nested_arguments_are_read_by_place_and_key():
    arguments = {"x": X, "pair": (X, (Y, X)), "named": {"cos": Y, "sin": [X]}}
    module = site(Nested, arguments, added)
    assert torch.equal(module(*arguments.values()), 4 * X + 2 * Y)


def test_results_are_nested_as_the_originals():
    def run(graph, x, y, grid):
        return {"hidden": (x, [y, None]), "both": added(graph, x, y, grid)}

    result = site(Plain, {"x": X, "y": Y}, run)(X, Y)
    assert torch.equal(result["hidden"][0], X)
    assert torch.equal(result["hidden"][1][0], Y)
    assert result["hidden"][1][1] is None
    assert torch.equal(result["both"], X + Y)


REFUSED = {
    "a constant": (Plain, {"x": X, "scale": 3.0}, (X,), {"scale": 4.0}, "scale != 3.0"),
    "a constant left out": (Plain, {"x": X, "scale": 3.0}, (X,), {}, "scale != 3.0"),
    "a truth": (Plain, {"x": X, "flag": True}, (X,), {"flag": False}, "flag != True"),
    "a default not captured": (Plain, {"x": X}, (X,), {"scale": 2.0}, "scale != 1.0"),
    "a truth not captured": (Plain, {"x": X}, (X,), {"flag": True}, "flag != False"),
    "a tensor not captured": (Plain, {"x": X}, (X, Y), {}, "y is not None"),
    "none, captured as none": (Plain, {"x": X, "y": None}, (X, Y), {}, "y is not None"),
    "a default of a keyword": (KeywordOnly, {"x": X, "y": Y}, (X,), {"y": Y, "scale": 1.0}, "scale != 2.0"),
    "more by place": (Variable, {"x": X}, (X, Y), {}, "len(rest) > 0"),
    "more by name": (Variable, {"x": X, "rope": Y}, (X,), {"rope": Y, "bias": Y}, "more has others than rope"),
    "more by name than none": (Variable, {"x": X}, (X,), {"bias": Y}, "more has others than (none)"),
    "less by name": (Variable, {"x": X, "rope": Y}, (X,), {}, "'rope' not in more"),
    "a constant nested": (Nested, {"x": X, "pair": (X, 2)}, (X, (X, 3)), {}, "pair[1] != 2"),
    "a constant by key": (Nested, {"x": X, "named": {"n": 2}}, (X, None, {"n": 1}), {}, "named['n'] != 2"),
    "a dtype": (Plain, {"x": X, "scale": torch.float32}, (X,), {"scale": torch.float16}, "scale != torch.float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_graph_was_not_made_for_is_refused_by_name(case):
    kind, arguments, args, kwargs, words = REFUSED[case]
    module = site(kind, arguments, first)
    with pytest.raises(RewriteError) as caught:
        module(*args, **kwargs)
    assert str(caught.value) == (
        f"blocks.7.attn: was converted for inputs without this: {words}. "
        "Convert again with example inputs that have it: linearize(model, example_inputs=dict(...))"
    )


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_graph_was_made_for_is_not(case):
    kind, arguments, *_ = REFUSED[case]
    assert torch.equal(site(kind, arguments, first)(**arguments), 2 * X)


def test_what_is_nested_is_needed_where_the_graph_reads_it():
    arguments = {"x": X, "pair": (X, Y)}
    with pytest.raises(RewriteError, match="without this: pair is None"):
        site(Nested, arguments, added)(X)
    assert torch.equal(site(Nested, arguments, first)(X), 2 * X)


def test_the_teacher_is_called_as_the_site_was():
    for kind, args, kwargs, expected in (
        (Plain, (X, Y), {"flag": True}, ((X, Y, 1.0, True), {})),
        (KeywordOnly, (X,), {"y": Y}, ((X,), {"y": Y, "scale": 2.0})),
        (Variable, (X, Y), {"y": 3, "z": 4}, ((X, Y), {"y": 3, "z": 4})),
        (PositionalOnly, (X, Y), {}, ((X, Y), {})),
    ):
        module = site(kind, {"x": X}, first)
        module.edit_teacher_is_on = lambda: True
        got = module(*args, **kwargs)
        assert [type(a) for a in got[0]] == [type(a) for a in expected[0]]
        assert all(a is b for a, b in zip(got[0], expected[0], strict=True))
        assert got[1] == expected[1]


class Result(dict):
    """A result of a class of its own."""


pytree.register_pytree_node(Result, lambda r: (list(r.values()), list(r)), lambda values, keys: Result(zip(keys, values, strict=True)))


@pytest.mark.parametrize("nested", [False, True])
def test_results_of_other_classes_are_refused(nested):
    def run(graph, x, grid):
        result = Result(a=x)
        return (x, result) if nested else result

    with pytest.raises(RewriteError, match="Plain returns a Result; a site must return tensors, tuples, lists or dicts"):
        site(Plain, {"x": X}, run)


def test_equal_sites_share_one_forward_without_sharing_their_modules():
    graph = fx.Graph()
    x, grid = graph.placeholder("x"), graph.placeholder("edit_grid")
    graph.output((graph.call_module("scale", (x,)),))
    grid.meta = {}
    captured = Capture(SimpleNamespace(call_spec=SimpleNamespace(out_spec=pytree.tree_structure(0))), {"x": Source("input", "x")})
    forward = generate_forward(graph, captured, Plain(), {"x": X})
    modules = []
    for factor in (2, 3):
        module = type("Site", (Plain,), {"forward": forward})()
        module.scale = nn.Linear(1, 1, bias=False)
        nn.init.constant_(module.scale.weight, factor)
        module.edit_teacher_is_on, module.edit_current_grid = lambda: False, lambda: None
        modules.append(module)
    assert [float(m(torch.ones(1, 1)).detach()) for m in modules] == [2, 3]


def test_the_checks_compile_into_one_graph():
    module = site(Variable, {"x": X, "rope": Y}, added)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X, rope=Y), X + Y)
