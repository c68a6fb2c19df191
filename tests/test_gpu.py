"""What only a GPU shows: its kernels against float64 on the CPU, converted models compiled, trained and in CUDA graphs. See also
`test_local_attention.py`."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edit_compile as ec
from edit_compile.adapters.inputs import inputs_for_size
from edit_compile.adapters.load_model import load_model
from edit_compile.bench.high_water import free_memory, measured_peak
from edit_compile.bench.run import Bench
from edit_compile.demo import models as demo
from edit_compile.designs.ops.kernels import operators
from edit_compile.designs.ops.linear_attention import attention_with_normaliser, linear_attention
from edit_compile.distillation import distill, load_recipe
from interpreted_kernels import expected_attention

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("without_tf32")]
CUDA = torch.device("cuda")
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
CAPTION = "a picture with a white background showing a large blue cross in the upper left part"


@pytest.fixture
def without_tf32() -> Iterator[None]:
    """Have float32 convolutions computed in float32, which products are, and not in TF32, as is the default on GPUs."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


def operands(queries: int, keys: int, channels: int, dtype: torch.dtype, heads: int = 3) -> list[Tensor]:
    """On the GPU, as a model's projections give them: heads are next to each other in the memory of a token."""
    generator = torch.Generator().manual_seed(0)
    sizes = (queries, keys, keys)
    made = (torch.randn(2, size, heads * channels, generator=generator, dtype=torch.float64) for size in sizes)
    return [x.to(CUDA, dtype).unflatten(2, (heads, channels)).transpose(1, 2) for x in made]


def softmax_in_float64(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (x.double().cpu() for x in (q, k, v))
    scores = q @ k.mT * scale
    if mask is not None:
        mask = mask.cpu()
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.double()
    return scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True)


def text_mask(kind: str, keys: int, dtype: torch.dtype) -> Tensor | None:
    counts = torch.arange(keys, device=CUDA) < torch.tensor([[keys - 3], [keys // 2]], device=CUDA)
    if kind == "none":
        return None
    return counts[:, None, None] if kind == "boolean" else torch.where(counts, 0.3, -1e4).to(dtype)[:, None, None]


@pytest.mark.gpu
@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
@pytest.mark.parametrize("channels", [64, 72, 128, 40])
@pytest.mark.parametrize("dtype", TOLERANCES)
@torch.no_grad()
def test_softmax_with_its_normaliser_by_fused_kernels(dtype: torch.dtype, channels: int, mask: str):
    attend = torch.compile(attention_with_normaliser, fullgraph=True, dynamic=True)
    for queries, keys in ((200, 77), (333, 154), (1024, 333)):
        q, k, v = operands(queries, keys, channels, dtype)
        counts = text_mask(mask, keys, dtype)
        expected, log_expected = softmax_in_float64(q, k, v, counts, 0.2)
        for way in (attention_with_normaliser, attend):
            y, log_normaliser = way(q, k, v, counts, 0.2)
            assert y.dtype == dtype
            assert log_normaliser.dtype == torch.float32
            assert relative_error(y, expected) < TOLERANCES[dtype]
            torch.testing.assert_close(log_normaliser.double().cpu(), log_expected, atol=100 * TOLERANCES[dtype], rtol=0)


@pytest.mark.gpu
@torch.no_grad()
def test_softmax_with_its_normaliser_keeps_no_scores():
    q, k, v = operands(16_384, 512, 128, torch.bfloat16)
    peak = measured_peak(lambda: attention_with_normaliser(q, k, v, None, 0.1), CUDA)
    assert peak is not None
    assert peak < 4 * q.numel() * q.itemsize < q.shape[0] * q.shape[1] * 16_384 * 512 * 4


@pytest.mark.gpu
@torch.no_grad()
def test_keys_of_which_every_one_is_masked_weigh_nothing():
    q, k, v = operands(64, 40, 64, torch.bfloat16)
    y, log_normaliser = attention_with_normaliser(q, k, v, torch.zeros(1, 1, 1, 40, dtype=torch.bool, device=CUDA), 0.1)
    assert torch.equal(y, torch.zeros_like(y))
    assert (log_normaliser < -1e30).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_linear_attention_and_its_gradients(dtype: torch.dtype):
    compiled = torch.compile(linear_attention, fullgraph=True, dynamic=True)
    for queries, keys in ((256, 64), (1000, 250)):
        q, k, v = (x.relu() if i < 2 else x for i, x in enumerate(operands(queries, keys, 64, dtype)))
        given = [x.detach().requires_grad_() for x in (q, k, v)]
        exact = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
        summary = exact[1].mT @ exact[2]
        expected = exact[0] @ summary / (exact[0] @ exact[1].sum(2, keepdim=True).mT)
        wanted = torch.autograd.grad(expected.square().sum(), exact)
        for way in (linear_attention, compiled):
            y, _ = way(*given)
            found = torch.autograd.grad(y.float().square().sum(), given)
            assert relative_error(y, expected) < TOLERANCES[dtype]
            assert max(map(relative_error, found, wanted)) < 5 * TOLERANCES[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("features", ["relu", "elu"])
@pytest.mark.parametrize("channels", [64, 72, 128, 40])
@pytest.mark.parametrize("dtype", TOLERANCES)
@torch.no_grad()
def test_linear_attention_by_its_triton_kernel(dtype: torch.dtype, channels: int, features: str):
    compiled = torch.compile(operators.linear_attention, fullgraph=True, dynamic=True)
    for queries, keys in ((256, 64), (1000, 2250)):
        q, k, v = operands(queries, keys, channels, dtype)
        for mask in (None, text_mask("boolean", keys, dtype)):
            expected, log_expected = expected_attention(*(x.cpu() for x in (q, k, v)), None if mask is None else mask.cpu(), features)
            for way in (operators.linear_attention, compiled):
                y, log_normaliser = way(q, k, v, mask, features)
                assert relative_error(y, expected) < TOLERANCES[dtype]
                torch.testing.assert_close(log_normaliser.double().cpu(), log_expected, atol=100 * TOLERANCES[dtype], rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@torch.no_grad()
def test_compressors_by_their_triton_kernel(dtype: torch.dtype):
    compress = torch.ops.edit_compile.depthwise
    compiled = torch.compile(lambda *given: compress(*given, 2), fullgraph=True, dynamic=True)
    convs = [nn.Conv2d(1152, 1152, 3, 2, 1, groups=1152).to(CUDA, dtype) for _ in range(2)]
    weights, biases = [conv.weight for conv in convs], [conv.bias for conv in convs]
    for rows, columns in ((16, 24), (33, 31)):
        generator = torch.Generator().manual_seed(rows)
        tokens = torch.randn(2, 2, rows * columns, 1152, generator=generator).to(CUDA, dtype)
        images = [x.unflatten(1, (rows, columns)).movedim(-1, 1) for x in tokens]
        expected = [conv.double().cpu()(image.double().cpu()) for conv, image in zip(copy.deepcopy(convs), images, strict=True)]
        for found in (
            compress(images, weights, biases, 2),
            compress(images[:1], weights[:1], biases[:1], 2),
            compiled(images, weights, biases),
        ):
            for y, wanted in zip(found, expected, strict=False):
                assert relative_error(y, wanted) < TOLERANCES[dtype]


@pytest.mark.gpu
@torch.no_grad()
def test_a_student_compiled_with_kernels_computes_what_it_does_on_the_cpu():
    torch.compiler.reset()
    student, sizes = student_of("auto"), ((32, 32), (48, 40), (64, 64))
    expected = {size: student(**inputs(student, *size))[0] for size in sizes}
    ec.compile(student.to(CUDA), kernels="always")
    for size in sizes:
        assert relative_error(student(**inputs(student, *size, CUDA))[0], expected[size]) < 1e-3


@pytest.mark.gpu
def test_kernels_are_measured_once(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    student = student_of("auto").to(CUDA, torch.bfloat16)
    found = ec.measure_kernels(student)
    assert {len(each.kernel) for each in found} == {2}
    assert [each.problem for each in found] == [None] * len(found)
    assert ec.measure_kernels(student) == found


DESIGNS = ("auto", "sana", "linfusion", "kv-compress", "linear-mm-alpha", "clear", "local-linear")


def student_of(design: str) -> nn.Module:
    """The joint-attention demo model, its added weights away from where they start."""
    student = ec.linearize(load_model("demo/mm-dit").model, ec.LinearizeConfig(design=design))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".edit." in name and parameter.is_floating_point():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return student


def inputs(model: nn.Module, height: int, width: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    torch.manual_seed(height * width)
    made = inputs_for_size(model, height, width, batch=2, device="cpu", dtype=torch.float32).inputs
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in made.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("design", DESIGNS)
@torch.no_grad()
def test_a_student_computes_on_the_gpu_what_it_does_on_the_cpu(design: str):
    """In one graph for all sizes, and eagerly."""
    torch.compiler.reset()
    student, sizes = student_of(design), ((32, 32), (48, 40), (64, 64))
    expected = {size: student(**inputs(student, *size))[0] for size in sizes}
    student.to(CUDA)
    eager = {size: student(**inputs(student, *size, CUDA))[0] for size in sizes}
    ec.compile(student)
    compiled = {size: student(**inputs(student, *size, CUDA))[0] for size in sizes}
    for size in sizes:
        assert relative_error(eager[size], expected[size]) < 1e-3
        assert relative_error(compiled[size], expected[size]) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("design", DESIGNS)
def test_a_compiled_training_step_under_autocast_has_the_gradients_of_float32(design: str):
    torch.compiler.reset()
    student = student_of(design)

    def gradients(device: torch.device | str, half: bool) -> Tensor:
        student.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            y = student(**inputs(student, 48, 48, device))[0]
        y.float().square().mean().backward()
        return torch.cat([p.grad.flatten().double().cpu() for p in student.parameters() if p.grad is not None])

    expected = gradients("cpu", half=False)
    student.to(CUDA)
    ec.compile(student)
    assert relative_error(gradients(CUDA, half=True), expected) < 0.1


@pytest.mark.gpu
@torch.no_grad()
def test_a_student_in_cuda_graphs():
    torch.compiler.reset()
    student = student_of("auto").to(CUDA)
    given = inputs(student, 32, 32, CUDA)
    expected = student(**given)[0].clone()
    compiled = torch.compile(student, mode="reduce-overhead", dynamic=False)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        found = compiled(**given)[0].clone()
        assert relative_error(found, expected) < 1e-3
    torch.compiler.reset()


@pytest.mark.gpu
@torch.no_grad()
def test_the_teacher_on_the_gpu_is_the_original_bit_for_bit():
    model = load_model("demo/mm-dit").model.to(CUDA)
    student = ec.linearize(model)
    given = inputs(model, 32, 48, CUDA)
    with ec.teacher(student):
        assert torch.equal(student(**given)[0], model(**given)[0])


@pytest.mark.gpu
def test_a_distillation_in_bfloat16_compiled_and_resumed(tmp_path):
    changes = ["precision=bf16", "compile=true", "layerwise.steps=2", "layerwise.global_batch_size=2", "stages.0.steps=4"]
    changes += ["stages.0.global_batch_size=4", "stages.0.micro_batch_size=2", "validation.samples=8", "samples.steps=2", "save_every=2"]
    recipe = load_recipe("demo-mm-dit", changes)
    result = distill(recipe, tmp_path / "run")
    assert next(result.student.parameters()).is_cuda
    assert math.isfinite(result.after.total)
    assert distill(recipe, tmp_path / "run", resume=True).after.total == pytest.approx(result.after.total, rel=0.05)


@pytest.mark.gpu
def test_a_demo_model_draws_on_the_gpu_what_it_does_on_the_cpu():
    model = load_model("demo/mm-dit").model
    expected = demo.sample(model, [CAPTION], steps=4)
    found = demo.sample(model.to(CUDA), [CAPTION], steps=4)
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


@pytest.mark.gpu
def test_a_bench_on_the_gpu_has_times_shares_and_peaks():
    torch.compiler.reset()
    report = Bench.make("demo/mm-dit", {"student": ec.LinearizeConfig()}, device="cuda", dtype=torch.bfloat16, compiled=True).run(
        [(64, 64), (128, 128)], runs=3
    )
    assert not report.impossible
    for row in report.rows:
        assert row.problem is None
        assert row.seconds is not None
        assert row.seconds.median > 0
        assert row.peak is not None
        assert 0 < row.peak < (free_memory(CUDA) or 0)
        assert (row.of_floor is None) == (row.name != "student")
