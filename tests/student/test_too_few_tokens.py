"""Below a number of image tokens a converted model runs as the original, call by call."""

from __future__ import annotations

import copy
import functools
import threading

import pytest
import torch
from torch import nn

import edit_compile as ec
import toy

GRIDS = [(3, 4), (5, 7), (4, 6), (9, 3), (8, 8), (10, 7)]
FEW = 30  # tokens: three of the grids have fewer


@functools.cache
def original() -> nn.Module:
    torch.manual_seed(0)
    return toy.shaken(toy.Toy(24, blocks=2, heads=4).eval())


@functools.cache
def converted() -> nn.Module:
    return ec.linearize(original(), example_inputs=toy.inputs())


@pytest.fixture
def student() -> nn.Module:
    copied = copy.deepcopy(converted())
    assert ec.set_min_tokens(copied, FEW) == FEW
    return copied


def calls() -> list[dict[str, torch.Tensor]]:
    return [toy.inputs(2, 2 * rows, 2 * columns) for rows, columns in GRIDS]


def is_original(model: nn.Module) -> list[bool]:
    with torch.no_grad():
        return [torch.equal(model(**given), original()(**given)) for given in calls()]


BELOW = [rows * columns < FEW for rows, columns in GRIDS]


def test_it_is_the_original_bit_for_bit_where_tokens_are_few(student: nn.Module, tmp_path):
    assert is_original(student) == is_original(copy.deepcopy(student)) == BELOW
    assert str(ec.plan_of(student)).endswith("below 30 image tokens it runs as the original (min_tokens)")
    assert ec.Plan.from_json(ec.plan_of(student).to_json()) == ec.plan_of(student)
    ec.save(student, tmp_path)
    loaded = ec.load(tmp_path, original())
    assert ec.plan_of(loaded).min_tokens == FEW
    assert is_original(loaded) == BELOW
    ec.set_min_tokens(student, 0)
    assert not any(is_original(student))
    assert "min_tokens" not in str(ec.plan_of(student))


def test_what_conversion_put_there_is_trained_audited_and_exported_at_every_size(student: nn.Module):
    given = calls()[0]
    student(**given).square().mean().backward()
    assert all(p.grad is not None for name, p in student.named_parameters() if ".edit." in name)
    assert not ec.audit(student).findings
    with torch.no_grad():
        program = torch.export.export(student, (), given).module()(**given)
        ec.set_min_tokens(student, 0)
        torch.testing.assert_close(program, student(**given))


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_it_takes_the_originals_graphs_beside_its_own(student: nn.Module, whole: bool):
    options = {"dynamic": True, "fullgraph": True, "backend": "eager"}

    def graphs(tokens: int) -> int:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        ec.set_min_tokens(student, tokens)
        compiled = (torch.compile if whole else ec.compile)(copy.deepcopy(student), **options)
        with torch.no_grad():
            for given in calls():
                torch.testing.assert_close(compiled(**given), student(**given), atol=1e-5, rtol=0)
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    alone = graphs(0)
    assert graphs(FEW) <= (alone + 1 if whole else 2 * alone)


def test_calls_in_threads_and_inside_teacher_blocks_decide_for_themselves(student: nn.Module):
    seen: list[list[bool]] = []
    threads = [threading.Thread(target=lambda: seen.append(is_original(student))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [BELOW, BELOW]
    with ec.teacher(student):
        assert all(is_original(student))


def test_weights_that_were_trained_outside_the_sites_do_not_meet_the_original_attention(student: nn.Module):
    ec.unshare(student)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".attn." not in name:
                parameter += 0.1
    assert is_original(student) == BELOW


@pytest.mark.parametrize("compiled", [False, True])
def test_with_lora_of_somebody_else_it_runs_as_converted(student: nn.Module, compiled: bool):
    peft = pytest.importorskip("peft")
    run = torch.compile(student, dynamic=True, fullgraph=True, backend="eager") if compiled else student
    with torch.no_grad():
        torch.testing.assert_close(run(**calls()[0]), original()(**calls()[0]), atol=1e-5, rtol=0)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), student)
    with torch.no_grad():
        found = [run(**given) for given in calls()]
        ec.set_min_tokens(student, 0)
        for x, given in zip(found, calls(), strict=True):
            torch.testing.assert_close(x, student(**given), atol=1e-5 if compiled else 0, rtol=0)


def test_with_weights_written_to_outside_the_sites_it_runs_as_converted(student: nn.Module):
    with torch.no_grad():
        student.out.weight += 0.1  # as fusing LoRA does
        found = [student(**given) for given in calls()]
        ec.set_min_tokens(student, 0)
        assert all(torch.equal(x, student(**given)) for x, given in zip(found, calls(), strict=True))


@pytest.mark.parametrize("tokens", [-1, True, "often", 2.5, None])
def test_what_is_no_number_is_refused(student: nn.Module, tokens):
    with pytest.raises(ec.ConfigError, match="min_tokens="):
        ec.set_min_tokens(student, tokens)
    assert ec.plan_of(student).min_tokens == FEW


def test_models_that_no_adapter_knows_need_a_number(student: nn.Module):
    for tokens in ("predicted", "measured"):
        with pytest.raises(ec.NoExampleInputsError):
            ec.set_min_tokens(student, tokens)
    assert ec.plan_of(student).min_tokens == FEW
