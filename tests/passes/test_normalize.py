"""normalize: a site's graph without what capture froze, and with the module's own submodules called."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from edit_compile.errors import RewriteError
from edit_compile.passes.capture import PROBE_DTYPE, capture, meta_copy
from edit_compile.passes.graph_walk import remove_dead
from edit_compile.passes.normalize import generalize_dtype_device, normalize, recover_module_calls
from hand_built import Built, aten, targets


def freed(built, *outputs):
    graph = built.output(*outputs)
    generalize_dtype_device(graph)
    remove_dead(graph)
    graph.lint()
    return graph


def run_as(graph, dtype, *inputs):
    return fx.Interpreter(fx.GraphModule({}, graph)).run(*(x.to(dtype) if x.is_floating_point() else x for x in inputs))


def test_a_cast_to_the_probe_dtype_means_the_inputs_dtype():
    built = Built(PROBE_DTYPE)
    x = built.input("x", 2, 3)
    up = built(aten.to.dtype, x, torch.float32)
    graph = freed(built, built(aten.to.dtype, built(aten.exp.default, up), PROBE_DTYPE))
    assert targets(graph) == ["to", "exp", "type_as"]
    for dtype in (torch.float16, torch.float64, torch.bfloat16):
        (y,) = run_as(graph, dtype, torch.randn(2, 3))
        assert y.dtype is dtype


def test_a_cast_of_what_has_no_ancestor_in_the_inputs_dtype_follows_the_input():
    """A RoPE table comes as float32 whatever the model's dtype; casting it to bfloat16 would round a float32 model's."""
    built = Built(PROBE_DTYPE)
    x, table = built.input("x", 2, 3), built.input("table", 3, dtype=torch.float32)
    graph = freed(built, built(aten.mul.Tensor, x, built(aten.to.dtype, table, PROBE_DTYPE)))
    values = torch.rand(3, dtype=torch.float32)
    (y,) = fx.Interpreter(fx.GraphModule({}, graph)).run(torch.ones(2, 3), values)
    assert torch.equal(y, values.expand(2, 3))


def test_casts_that_change_nothing_go_and_others_stay():
    built = Built(PROBE_DTYPE)
    x, n = built.input("x", 2), built.input("n", 2, dtype=torch.int64)
    same = built(aten.to.dtype, x, PROBE_DTYPE)
    graph = freed(built, built(aten._to_copy.default, same, dtype=torch.float32), built(aten.to.dtype, n, torch.bool))
    assert [n.args[1] for n in graph.nodes if n.op == "call_function"] == [torch.float32, torch.bool]


def test_constants_are_made_on_the_inputs_device_and_in_its_dtype():
    built = Built(PROBE_DTYPE)
    x = built.input("x", 3)
    line = built(aten.arange.default, 3, dtype=PROBE_DTYPE, device=torch.device("meta"))
    count = built(aten.arange.default, 3, dtype=torch.int64, device=torch.device("meta"))
    graph = freed(built, built(aten.add.Tensor, x, line), count)
    y, n = run_as(graph, torch.float64, torch.zeros(3))
    assert (y.dtype, n.dtype, y.device.type) == (torch.float64, torch.int64, "cpu")
    assert torch.equal(y, torch.arange(3.0, dtype=torch.float64))


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.norm(x))


class Scaled(nn.Module):
    def forward(self, x, scale=1.0):
        return x * scale


class Asserts(nn.Module):
    """A submodule, one that is given a constant, one called twice, a cast, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.scaled, self.twice, self.gate = Inner(), Scaled(), nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x, y):
        return self.scaled(self.inner(x), 3.0) * self.gate.float().to(x.dtype) + self.twice(self.twice(x)) + self.twice(y)


@pytest.fixture(scope="module")
def normalized():
    module = Asserts()
    return module, normalize(capture(module, {"x": torch.zeros(2, 3, 4), "y": torch.zeros(2, 3, 4)}), module)


def test_submodules_are_called_so_that_hooks_and_adapters_act(normalized):
    module, graph = normalized
    assert [n.target for n in graph.nodes if n.op == "call_module"].count("inner") == 1
    assert not any("_assert" in name for name in targets(graph))
    inputs = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    runner = fx.GraphModule(module, graph)
    torch.testing.assert_close(runner(*inputs)[0], module(*inputs), atol=1e-6, rtol=1e-6)
    for path in ("inner", "twice"):
        handle = module.get_submodule(path).register_forward_hook(lambda module, args, output: output + 1)
        torch.testing.assert_close(runner(*inputs)[0], module(*inputs), atol=1e-6, rtol=1e-6)
        handle.remove()


def test_what_a_submodule_was_given_beside_its_tensor_is_not_lost(normalized):
    _, graph = normalized
    assert "scaled" not in [n.target for n in graph.nodes if n.op == "call_module"]


def test_parameters_keep_their_names(normalized):
    _, graph = normalized
    assert {n.target for n in graph.nodes if n.op == "get_attr"} == {"gate"}
    assert [n.name for n in graph.nodes if n.op == "placeholder"] == ["x", "y"]


def test_a_submodule_of_two_tensors_or_two_results_is_not_raised():
    built = Built()
    x, y = built.input("x", 2, 4), built.input("y", 2, 4)
    both = built(aten.add.Tensor, x, y, at="inner")
    half = built(aten.relu.default, both, at="linear")
    graph = built.output(half, built(aten.neg.default, half, at="linear"))
    recover_module_calls(graph, nn.ModuleDict({"inner": nn.Identity(), "linear": nn.Identity()}))
    assert not any(n.op == "call_module" for n in graph.nodes)


class ReadsATensor(nn.Module):
    def __init__(self):
        super().__init__()
        self.tables = [torch.ones(4)]

    def forward(self, x):
        return x * self.tables[0]


class MakesTensors(nn.Module):
    def forward(self, x):
        return x * torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=x.dtype, device=x.device) + torch.tensor([1, 2, 3, 4]) + x.new_tensor(0.7)


def test_a_tensor_of_somebody_else_names_the_fix():
    captured = capture(ReadsATensor(), {"x": torch.zeros(2, 4)}, functional=True)
    with pytest.raises(RewriteError, match="ReadsATensor reads a tensor in its forward that is not its own; register it as a buffer"):
        normalize(captured, ReadsATensor())


class MakesALargeTensor(nn.Module):
    def forward(self, x):
        return x * torch.tensor([0.5] * 5000, dtype=x.dtype, device=x.device)


def test_a_large_tensor_of_plain_numbers_is_called_that():
    captured = capture(MakesALargeTensor(), {"x": torch.zeros(2, 5000)}, functional=True)
    with pytest.raises(RewriteError, match=r"makes a tensor of 5,000 plain numbers in its forward, .* at most 4,096; make it once"):
        normalize(captured, MakesALargeTensor())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_of_plain_numbers_are_made_in_the_inputs_dtype(dtype):
    """Capture in bfloat16 must not round them: 0.1 is the nearest number of the dtype that runs."""
    graph = normalize(capture(MakesTensors(), {"x": torch.zeros(2, 4)}, functional=True), MakesTensors())
    x = torch.randn(3, 4, dtype=dtype)
    (result,) = fx.GraphModule({}, graph)(x)
    assert result.dtype is dtype
    torch.testing.assert_close(result, MakesTensors()(x), rtol=0, atol=0)


def test_the_captured_graph_is_left_as_it_was():
    built = Built(PROBE_DTYPE)
    x = built.input("x", 2, 4)
    built.output(built(aten.to.dtype, x, torch.float32))
    captured = built.capture()
    before = str(captured.graph)
    normalize(captured, meta_copy(Inner()))
    assert str(captured.graph) == before
