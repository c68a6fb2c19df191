"""torchao's int8, weight-only and dynamic, before and after conversion; the errors are of the demo models' trained weights."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import edit_compile as ec
from edit_compile.adapters.denoise import denoise, random_batch
from edit_compile.student.site import converted_sites

quantization = pytest.importorskip("torchao.quantization")
CONFIGS = {
    "weights": lambda: quantization.Int8WeightOnlyConfig(),
    "dynamic": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
}
LIMIT = {"weights": 0.02, "dynamic": 0.05}  # of the relative error of an output


@pytest.fixture(scope="module", params=["demo/mm-dit", "demo/dit"])
def model(request):
    return ec.load_model(request.param).model


@pytest.fixture(scope="module")
def student(model):
    return ec.linearize(model)


def quantized(module, kind, chosen=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of versions that are to come
        quantization.quantize_(module, CONFIGS[kind](), filter_fn=chosen)
    return module


@torch.no_grad()
def output(module, height=32, width=24):
    torch.manual_seed(0)
    x, conditions = random_batch(module, height, width, 2)
    return denoise(module, x, torch.tensor([200.0, 700.0]), conditions)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_student_is_quantized(student, kind):
    expected = output(student)
    changed = quantized(copy.deepcopy(student), kind)
    assert 0 < relative(output(changed), expected) < LIMIT[kind]
    assert torch.equal(output(student), expected)  # the student it was copied from


def outside(model):
    """Chooses the Linears of the feed-forward networks, for quantization before conversion."""
    return lambda module, path: isinstance(module, nn.Linear) and ".ff." in path


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_whose_other_weights_are_quantized_is_converted(model, student, kind):
    """The sites begin the same: only what was quantized differs."""
    base = quantized(copy.deepcopy(model), kind, outside(model))
    converted = ec.linearize(base)
    converted.load_state_dict(
        {name: t for name, t in student.state_dict().items() if name.startswith(tuple(converted_sites(student)))}, strict=False
    )
    assert 0 < relative(output(converted), output(student)) < LIMIT[kind]
    with ec.teacher(converted):
        assert torch.equal(output(converted), output(base))


@pytest.mark.parametrize("kind", CONFIGS)
def test_quantized_attention_is_not_converted(model, kind):
    base = quantized(copy.deepcopy(model), kind)
    with pytest.raises(ec.RewriteError, match=r"is quantized \(\w+\) and would be trained: convert the model before it is quantized"):
        ec.linearize(base)


def test_the_teacher_of_a_quantized_student_is_refused_unless_it_kept_the_original_weights(model, student):
    changed = quantized(copy.deepcopy(student), "weights")
    with (
        pytest.raises(
            ec.EditCompileError, match=r"outside the converted sites were written to; call edit_compile.unshare\(student\) before"
        ),
        ec.teacher(changed),
    ):
        pass
    kept = copy.deepcopy(student)
    ec.unshare(kept)
    quantized(kept, "weights")
    with ec.teacher(kept):
        assert torch.equal(output(kept), output(model))


def test_a_quantized_student_is_neither_saved_nor_exported(student, tmp_path):
    changed = quantized(copy.deepcopy(student), "weights")
    with pytest.raises(ec.CheckpointError, match="quantized"):
        ec.save(changed, tmp_path / "student")
    with pytest.raises(ec.ExportError, match=r"is quantized \(\w+\): export the student before"):
        ec.export(changed, tmp_path / "student.pt2")


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_quantized_student_is_compiled(student, kind):
    changed = quantized(copy.deepcopy(student), kind)
    expected = [output(changed), output(changed, 24, 40)]
    ec.compile(changed)
    for found, one in zip([output(changed), output(changed, 24, 40)], expected, strict=True):
        assert relative(found, one) < 1e-2  # dynamic rounding to int8 is at other places
