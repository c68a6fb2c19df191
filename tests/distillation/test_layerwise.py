"""The layerwise fit trains each site against its teacher, on the teacher's activations, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import edit_compile as ec
import toy
import toy_distill
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.distillation import distill
from edit_compile.distillation.context import trained_parameters
from edit_compile.distillation.train.layerwise import layerwise_fit
from edit_compile.distillation.train.train_context import only_trainable
from edit_compile.student.site import converted_sites

H, W = 12, 16


@pytest.fixture
def student():
    student = toy_distill.student()
    toy.shaken(nn.ModuleList(site.edit for site in converted_sites(student).values()))
    return student


@pytest.fixture
def call():
    inputs = toy.inputs(3, H, W, toy_distill.TEXT, 5)
    return lambda model: model(**inputs)


def keeper(calls, path):
    def hook(module, args, kwargs, output):
        calls[path] = (args, kwargs, output)

    return hook


def replayer(calls, path):
    def hook(module, args, kwargs):
        return calls[path][:2]

    return hook


def fit(student, call, share=1.0):
    with only_trainable(student, trained_parameters(student, "attention")), layerwise_fit(student, share) as losses:
        output = call(student)
        gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    return output, losses, gradients


def test_the_teachers_activations_flow_on(student, call):
    output, _, _ = fit(student, call)
    with ec.teacher(student):
        assert torch.equal(output, call(student))
    assert not output.requires_grad


def test_losses_and_gradients_are_each_sites_own(student, call):
    """Against the sites' outputs on inputs recorded from the teacher, relative errors by hand."""
    _, losses, gradients = fit(student, call)
    calls = {}
    for path, site in converted_sites(student).items():
        site.register_forward_hook(keeper(calls, path), with_kwargs=True)
    with torch.no_grad(), ec.teacher(student):
        call(student)
    assert calls.keys() == losses.keys()
    of_teacher = dict(calls)
    for path, site in converted_sites(student).items():
        site.register_forward_pre_hook(replayer(of_teacher, path), with_kwargs=True)
    call(student)
    for path, site in converted_sites(student).items():
        found, expected = (y if isinstance(y, tuple) else (y,) for y in (calls[path][2], of_teacher[path][2]))
        parts = [
            sum((f[row] - e[row]).square().sum() for f, e in zip(found, expected, strict=True))
            / sum(e[row].square().sum() for e in expected)
            for row in range(3)
        ]
        loss = sum(parts) / len(parts)
        torch.testing.assert_close(losses[path], loss.detach(), rtol=1e-5, atol=0)
        for (name, p), g in zip(site.named_parameters(), torch.autograd.grad(loss, list(site.parameters())), strict=True):
            torch.testing.assert_close(gradients.pop(f"{path}.{name}"), g, rtol=1e-4, atol=1e-6)
            assert p.grad is None
    assert not gradients


def test_gradients_have_their_parameters_strides(student, call):
    """Fused optimizers go through the memory of both alike, and convolutions may give gradients with the channels last."""
    strides = {name: p.stride() for name, p in student.named_parameters()}
    with only_trainable(student, trained_parameters(student, "attention")), layerwise_fit(student, 1.0):
        call(student)
        assert {name: p.grad.stride() for name, p in student.named_parameters() if p.grad is not None}.items() <= strides.items()


def test_gradients_add_up_over_forwards(student, call):
    _, losses, gradients = fit(student, call)
    with only_trainable(student, trained_parameters(student, "attention")), layerwise_fit(student, 0.5) as halves:
        call(student)
        call(student)
        for name, p in student.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(p.grad, gradients[name], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(halves, losses)


def test_it_leaves_no_hooks_and_no_switches(student, call):
    before = call(student)
    required = [p.requires_grad for p in student.parameters()]
    fit(student, call)
    assert [p.requires_grad for p in student.parameters()] == required
    assert all(p.grad is None for p in student.parameters())
    assert torch.equal(call(student), before)


def test_inserted_leaves_the_models_own_weights_alone(student):
    names = trained_parameters(student, "inserted")
    assert names
    assert all(".attn.edit." in name for name in names)
    assert len(names) < len(trained_parameters(student, "attention"))


def test_a_source_may_draw_with_the_student_itself(tmp_path):
    student = toy_distill.student()

    class Drawn(toy_distill.ToySource):
        concurrent = False

        def batch(self, request):
            with torch.no_grad(), ec.teacher(student):
                student(**toy.inputs(1, H, W, toy_distill.TEXT))
            return super().batch(request)

    rows = {}
    for name, model, source in (("drawn", student, Drawn()), ("read", toy_distill.student(), toy_distill.ToySource())):
        rows[name] = []
        options = {
            "source": source,
            "denoise": toy_distill.denoise,
            "schedule": NoiseSchedule("rectified-flow"),
            "report": rows[name].append,
        }
        distill(toy_distill.recipe(), tmp_path / name, student=model, **options)
    assert [row["loss"] for row in rows["drawn"]] == [row["loss"] for row in rows["read"]]
