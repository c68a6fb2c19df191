"""Triton kernels: the operators against float64, in torch.compile and torch.export; the kernels in Triton's interpreter; where they run."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import edit_compile as ec
import interpreted_kernels as interpreted
import toy
from edit_compile.bench.kernels import compare
from edit_compile.designs.ops.kernels import choice, operators
from edit_compile.designs.ops.kernels.choice import Comparison, KernelCase
from edit_compile.student.site import converted_sites

LINEAR = KernelCase(operator="linear_attention", sizes=(2, 24, 24), features="relu")
DEPTHWISE = KernelCase(operator="depthwise", sizes=(24, 2))
WITHIN = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}


def operands(dtype: torch.dtype = torch.float32, queries: int = 7, keys: int = 5, trained: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries)
    sizes = ((queries, 4), (keys, 4), (keys, 3))
    return [torch.randn(2, 3, *size, generator=generator, dtype=dtype).requires_grad_(trained) for size in sizes]


def images(dtype: torch.dtype = torch.float32, trained: bool = False) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def pair(*shape: int) -> list[Tensor]:
        return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(trained) for _ in range(2)]

    return pair(2, 4, 5, 6), pair(4, 1, 3, 3), pair(4)


# ------------------------------------------------------------------ in Triton's interpreter


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    pytest.importorskip("triton", reason="builds of torch for CPUs come without Triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, interpreted.__file__], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", [*interpreted.CASES, *interpreted.IMAGES, "nothing to divide by"])
def test_a_kernel_computes_the_formula(errors: dict[str, float], case: str):
    dtype = next((name for name in (*interpreted.CASES.get(case, ()), *interpreted.IMAGES.get(case, ())) if name in WITHIN), "float32")
    assert errors[case] < WITHIN[dtype]


# ------------------------------------------------------------------ compiled for GPUs, without one


class Recorder:
    """Stands for `wrap_triton`: notes the kernels that are launched, with their arguments by name."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, dict[str, Any], int]] = []

    def __call__(self, kernel: Any) -> Any:
        def launch(*args: Any, num_warps: int = 4, **constants: Any) -> None:
            given = {**dict(zip(kernel.arg_names, args, strict=False)), **constants}
            self.launches.append((kernel, {name: given[name] for name in kernel.arg_names}, num_warps))

        return defaultdict(lambda: launch)


def type_of(value: Any) -> str:
    """The type that Triton compiles a kernel's argument for; ones are constants, as flags and numbers are."""
    if isinstance(value, Tensor):
        return {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[value.dtype]
    return "i32" if type(value) is int and value != 1 else "constexpr"


@pytest.mark.slow
@pytest.mark.parametrize("channels", [64, 72, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_compile_for_gpus_and_fit_into_their_shared_memory(dtype: torch.dtype, channels: int, monkeypatch: pytest.MonkeyPatch):
    triton = pytest.importorskip("triton", reason="builds of torch for CPUs come without Triton")
    backends = pytest.importorskip("triton.backends.compiler")
    monkeypatch.setattr(operators, "wrap_triton", recorder := Recorder())
    with FakeTensorMode():
        make = partial(torch.empty, device="cuda", dtype=dtype)
        q, k, v = (make(2, tokens, 3 * channels).unflatten(2, (3, channels)).transpose(1, 2) for tokens in (400, 100, 100))
        images = [make(2, 400, channels).unflatten(1, (20, 20)).movedim(-1, 1) for _ in range(2)]
        torch.ops.edit_compile.linear_attention(q, k, v, "elu", torch.empty(2, 1, 100, 1, device="cuda"))
        torch.ops.edit_compile.depthwise(images, [make(channels, 1, 3, 3)] * 2, [make(channels)] * 2, 2)
    assert [kernel.fn.__name__ for kernel, _, _ in recorder.launches] == ["sum_keys", "attend", "thin_both"]
    for kernel, given, warps in recorder.launches:
        constant = {param.name for param in kernel.params if param.is_constexpr}
        types = {name: "constexpr" if name in constant else type_of(value) for name, value in given.items()}
        fixed = {(place,): given[name] for place, name in enumerate(types) if types[name] == "constexpr"}
        whole = [place for place, name in enumerate(types) if types[name][0] == "*" or (types[name] == "i32" and given[name] % 16 == 0)]
        attributes = {(place,): [["tt.divisibility", 16]] for place in whole}
        source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=fixed, attrs=attributes)
        for capability, shared in ((80, 163), (89, 99), (90, 227)):  # in KiB, for a block of threads
            target = backends.GPUTarget("cuda", capability, 32)
            compiled = triton.compile(source, target=target, options={"num_warps": warps})
            assert compiled.asm["cubin"]
            assert compiled.metadata.shared <= shared * 1024


# ------------------------------------------------------------------ the operators


@pytest.mark.parametrize("features", ["none", "relu", "elu"])
@pytest.mark.parametrize("mask", [None, torch.arange(5)[None, None, None] < 4, torch.linspace(-2, 1, 5)[None, None, None]])
@torch.no_grad()
def test_linear_attention_is_its_formula(features: str, mask: Tensor | None):
    q, k, v = operands()
    if features == "none":
        q, k = q.abs(), k.abs()
    y, log_normaliser = operators.linear_attention(q, k, v, mask, features)
    expected, log_expected = interpreted.expected_attention(q, k, v, mask, features)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_normaliser.double(), log_expected, atol=1e-5, rtol=1e-5)


LOOKS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it itself


@LOOKS
def test_what_torch_asks_of_an_operator():
    q, k, v = operands(trained=True)
    weights = torch.rand(2, 1, 5, 1, requires_grad=True)
    torch.library.opcheck(torch.ops.edit_compile.linear_attention.default, (q, k, v, "elu", weights))
    torch.library.opcheck(torch.ops.edit_compile.depthwise.default, (*images(trained=True), 2))


def test_gradients():
    weights = torch.rand(1, 3, 5, 1, dtype=torch.float64, requires_grad=True)
    q, k, v = operands(torch.float64, trained=True)
    assert torch.autograd.gradcheck(lambda *given: torch.ops.edit_compile.linear_attention(*given[:3], "elu", given[3]), (q, k, v, weights))
    given = [x for each in images(torch.float64, trained=True) for x in each]
    assert torch.autograd.gradcheck(lambda *x: tuple(torch.ops.edit_compile.depthwise(x[:2], x[2:4], x[4:], 2)), given)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, 2, 1, groups=4)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, image: Tensor) -> tuple[Tensor, ...]:
        return *torch.ops.edit_compile.linear_attention(q, k, v, "relu", None), *torch.ops.edit_compile.depthwise(
            [image], [self.conv.weight], [self.conv.bias], 2
        )


@torch.no_grad()
def test_one_graph_and_one_exported_program_with_the_operators_serve_all_sizes():
    torch.compiler.reset()
    graphs: list[torch.fx.GraphModule] = []
    model = Both()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph)
    dim = torch.export.Dim.AUTO
    shapes = ({2: dim}, {2: dim}, {2: dim}, {2: dim, 3: dim})
    program = torch.export.export(model, (*operands(), torch.randn(2, 4, 9, 8)), dynamic_shapes=shapes)
    for size in (11, 13, 17):  # no two sizes are the same, or torch would take them for one
        given = (*operands(queries=2 * size, keys=size), torch.randn(2, 4, size + 20, size + 30))
        for found in (compiled(*given), program.module()(*given)):
            torch.testing.assert_close(found, model(*given), atol=1e-6, rtol=1e-5)
    torch.compiler.reset()
    assert len(graphs) == 1
    for code in (graphs[0].code, program.graph_module.code):
        assert "edit_compile.linear_attention" in code
        assert "edit_compile.depthwise" in code


@torch.no_grad()
def test_an_operator_is_its_formula_where_it_is_lowered():
    q, k, v = operands()
    torch.compiler.reset()
    y, _ = torch.compile(lambda *x: operators.linear_attention(*x, None, "relu"), fullgraph=True, dynamic=True, backend="aot_eager")(
        q, k, v
    )
    torch.testing.assert_close(y.double(), interpreted.expected_attention(q, k, v, None, "relu")[0], atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


# ------------------------------------------------------------------ where they run


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """A student, and a copy that stays as it is."""
    converted = ec.linearize(toy.Toy(joint=True, blocks=1).eval(), example_inputs=toy.inputs(text=5))
    toy.shaken(nn.ModuleList(converted_sites(converted).values()), amount=0.1)
    return converted, copy.deepcopy(converted)


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Have this machine's CPU count as a device that kernels run on, in an empty cache of measurements."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "can_run", lambda device: True)


def operators_in_graphs(models: tuple[nn.Module, nn.Module], **options: object) -> set[str]:
    """Compile the student; returns which of the operators are in its graphs, and checks what it computes."""
    torch.compiler.reset()
    codes: list[str] = []
    ec.compile(models[0], backend=lambda graph, _: codes.append(graph.code) or graph, **options)
    with torch.no_grad():
        given = toy.inputs(1, text=5)
        torch.testing.assert_close(models[0](**given), models[1](**given), atol=1e-5, rtol=1e-5)
    torch.compiler.reset()
    return {name for name in ("linear_attention", "depthwise") if any(f"ops.edit_compile.{name}" in code for code in codes)}


def kept(case: KernelCase, **results: object) -> None:
    choice.keep(Comparison(conditions=choice.conditions(case, torch.empty(1)), **results))


def cases_of(student: nn.Module) -> dict[str, KernelCase]:
    return {case.operator: case for _, case, _ in choice.cases_in(student)}


def test_without_a_gpu_no_kernel_is_used(models: tuple[nn.Module, nn.Module]):
    assert ec.measure_kernels(models[0]) == []
    assert operators_in_graphs(models) == set()
    with pytest.raises(ec.ConfigError, match="needs Triton and a model on a CUDA device; this one is on cpu"):
        ec.compile(models[0], kernels="always")
    with pytest.raises(ec.ConfigError, match="'auto', 'always', 'never'"):
        ec.compile(models[0], kernels="measured")


@pytest.mark.usefixtures("with_kernels")
def test_a_kernel_is_used_only_where_it_was_measured_to_win(models: tuple[nn.Module, nn.Module]):
    assert set(cases_of(models[0])) == {"linear_attention", "depthwise"}
    linear, depthwise = (cases_of(models[0])[name] for name in ("linear_attention", "depthwise"))
    assert operators_in_graphs(models) == set()  # nothing was measured
    kept(linear, kernel=(1.0, 2.0), inductor=(2.0, 4.0), kernel_error=1e-3, inductor_error=1e-3)
    kept(depthwise, problem="CompilationError: no")
    assert operators_in_graphs(models) == {"linear_attention"}
    assert operators_in_graphs(models, kernels="always") == {"linear_attention", "depthwise"}


@pytest.mark.parametrize(
    ("results", "wins"),
    [
        ({"kernel": (1.0, 2.0), "inductor": (2.0, 4.0), "kernel_error": 1e-3, "inductor_error": 1e-3}, True),
        ({"kernel": (1.0, 4.1), "inductor": (2.0, 4.0)}, False),
        ({"kernel": (1.0,), "inductor": (1.01,)}, False),
        ({"kernel": (1.0,), "inductor": (2.0,), "kernel_error": 0.01, "inductor_error": 0.001}, False),
        ({"kernel": (1.0,), "inductor": (2.0,), "problem": "wrong"}, False),
        ({}, False),
    ],
)
def test_a_kernel_wins_if_it_is_faster_at_every_size_and_as_exact(results: dict[str, object], wins: bool):
    assert Comparison(conditions={}, **results).wins is wins


@LOOKS
@pytest.mark.usefixtures("with_kernels")
def test_what_is_trained_runs_as_written(models: tuple[nn.Module, nn.Module]):
    torch.compiler.reset()
    codes: list[str] = []
    ec.compile(models[0], kernels="always", backend=lambda graph, _: codes.append(graph.code) or graph)
    models[0](**toy.inputs(1, text=5)).mean().backward()
    models[0].zero_grad()
    torch.compiler.reset()
    assert codes
    assert not any("ops.edit_compile" in code for code in codes)


@pytest.mark.parametrize("case", [LINEAR, DEPTHWISE])
def test_a_comparison_has_times_and_errors_at_each_size(case: KernelCase):
    torch.compiler.reset()
    found = compare(case, torch.empty(1), (4, 6), runs=2, backend="eager")
    torch.compiler.reset()
    assert len(found.kernel) == len(found.inductor) == 2
    assert min(found.kernel + found.inductor) > 0
    assert max(found.kernel_error, found.inductor_error) < 1e-5
    assert Comparison.model_validate_json(found.model_dump_json()) == found


@pytest.mark.usefixtures("with_kernels")
def test_what_fails_to_compile_is_kept_as_a_problem_and_not_tried_again(
    models: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: object, **__: object) -> Comparison:
        raise RuntimeError("no such instruction\nat all")

    monkeypatch.setattr("edit_compile.bench.kernels.can_run", lambda device: True)
    monkeypatch.setattr("edit_compile.bench.kernels.compare", fails)
    first = ec.measure_kernels(models[0])
    assert [found.problem for found in first] == ["RuntimeError: no such instruction"] * 2
    monkeypatch.setattr("edit_compile.bench.kernels.compare", None)
    assert ec.measure_kernels(models[0]) == first
