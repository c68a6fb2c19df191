"""LoRA that is exchanged under compiled blocks, by diffusers' hot-swapping."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import edit_compile as ec
import toy
from edit_compile.student.site import converted_sites
from families import FAMILIES

TARGETS = ["to_q", "to_add_out", "proj_out"]


@pytest.fixture(scope="module")
def model():
    return FAMILIES["flux"]()[0]


def student_of(model):
    torch.manual_seed(0)
    student = ec.linearize(model, example_inputs=FAMILIES["flux"]()[1])
    toy.shaken(torch.nn.ModuleList(converted_sites(student).values()), amount=0.1)
    return student


def adapter(model, rank, seed):
    """The state of a random LoRA of a model, in sites and outside of them, as diffusers saves it."""
    student = student_of(model)
    student.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return {f"transformer.{name}": tensor for name, tensor in get_peft_model_state_dict(student).items()}


@torch.no_grad()
def output(student):
    return student(**FAMILIES["flux"]()[1])[0]


def expected(model, state):
    student = student_of(model)
    student.load_lora_adapter(state, prefix="transformer")
    return output(student)


@pytest.mark.slow
def test_an_adapter_is_exchanged_without_compiling_again(model):
    first, second = adapter(model, 4, 1), adapter(model, 6, 2)
    student = student_of(model)
    plain = output(student)
    student.enable_lora_hotswap(target_rank=8)
    student.load_lora_adapter(first, prefix="transformer", adapter_name="style")
    torch._dynamo.reset()
    ec.compile(student, backend="aot_eager")
    torch.testing.assert_close(output(student), expected(model, first), atol=1e-5, rtol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        student.load_lora_adapter(second, prefix="transformer", adapter_name="style", hotswap=True)
        swapped = output(student)
    torch.testing.assert_close(swapped, expected(model, second), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(swapped, plain, atol=1e-3)
    with ec.teacher(student):
        torch.testing.assert_close(output(student), output(model), atol=1e-5, rtol=1e-5)
