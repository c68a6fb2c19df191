"""The one handle on a converted model: found behind whatever wraps it, copied with it, and in nobody's files."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.distributed
from peft import LoraConfig, get_peft_model
from torch import nn

import edit_compile as ec
import toy
from edit_compile.student.handle import conversion_of, unwrap
from edit_compile.student.site import converted_sites

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def base():
    return toy.shaken(toy.Toy(joint=True).eval())


@pytest.fixture
def student(base):
    return ec.linearize(base, example_inputs=toy.inputs(text=5))


def call(model):
    with torch.no_grad():
        return model(**toy.inputs(2, 10, 14, 5, 3))


def with_adapters(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["to_q"]))


def compiled(model):
    return torch.compile(model, backend="eager")


def in_pipeline(model):
    return SimpleNamespace(transformer=model)


def test_hooks_of_a_site_run_once_around_teacher_and_student():
    hooked, plain = (toy.shaken(toy.Toy().eval()) for _ in range(2))

    def add_hooks(model):
        model.blocks[0].attn.register_forward_pre_hook(lambda module, args: (args[0] - 0.5, *args[1:]))
        model.blocks[0].attn.register_forward_hook(lambda module, args, output: 2 * output)

    add_hooks(hooked)
    with_hooks, later = (ec.linearize(model, example_inputs=toy.inputs()) for model in (hooked, plain))
    later.load_state_dict(with_hooks.state_dict())
    add_hooks(later)
    given = toy.inputs(2, 10, 14)
    with torch.no_grad():
        assert torch.equal(with_hooks(**given), later(**given))
        with ec.teacher(with_hooks):
            assert torch.equal(with_hooks(**given), hooked(**given))


class Scaled(toy.ToyAttention):
    """With a tensor that is neither a parameter nor a buffer."""

    def projected(self, tokens):
        query, key, value = super().projected(tokens)
        return query, key, value * self.scale


def test_a_tensor_that_a_site_reads_may_be_set():
    base, given = toy.shaken(toy.Toy(blocks=1).eval()), toy.inputs(2, 10, 14)
    base.blocks[0].attn.__class__, base.blocks[0].attn.scale = Scaled, torch.ones(24)
    student = ec.linearize(base, example_inputs=toy.inputs())
    base.blocks[0].attn.scale = torch.linspace(-1, 1, 24)
    expected = ec.linearize(base, plan=ec.plan_of(student))
    expected.load_state_dict(student.state_dict())
    student.blocks[0].attn.scale = torch.linspace(-1, 1, 24)
    with torch.no_grad():
        assert torch.equal(student(**given), expected(**given))


def checkpointed_from_a_feature(student):
    """Gradients of a loss that begins in the middle of the first block, which runs again for them."""
    student.gradient_checkpointing, kept = True, []
    handle = student.blocks[0].attn.register_forward_hook(lambda module, args, output: kept.append(output))
    student(**toy.inputs(2, 10, 14, 5, 3))
    handle.remove()
    kept[0].square().mean().backward()
    return {name: p.grad for name, p in student.blocks[0].attn.named_parameters() if p.grad is not None}


def test_a_copys_checkpointed_blocks_run_again_in_the_copys_calls(student):
    twin = copy.deepcopy(student)
    expected, found = checkpointed_from_a_feature(student), checkpointed_from_a_feature(twin)
    assert expected
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_one_name_stands_for_a_list_of_it(student):
    with ec.teacher(student, students="blocks.0.attn"):
        pass
    assert ec.add_lora(student, 1, targets="blocks.0.ff.0") == ["blocks.0.ff.0"]
    ec.merge_lora(student)
    assert {"out.bias", "out.weight"} <= set(ec.unshare(student, "out.*"))


WRAPPERS = {
    "PEFT": with_adapters,
    "compiled": compiled,
    "pipeline": in_pipeline,
    "a compiled one in a pipeline": lambda model: in_pipeline(compiled(model)),
    "adapters, compiled, in a pipeline": lambda model: in_pipeline(compiled(with_adapters(model))),
    "data parallel": nn.DataParallel,
    "compiled twice": lambda model: compiled(nn.DataParallel(compiled(model))),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_it_is_found_behind_wrappers(base, student, wrap):
    wrapped = wrap(student)
    assert unwrap(wrapped) is student
    assert conversion_of(wrapped) is student.edit_conversion
    assert ec.plan_of(wrapped) is student.edit_conversion.plan
    with ec.teacher(wrapped):
        assert torch.equal(call(student), call(base))


def test_it_is_found_behind_ddp(student, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = compiled(nn.parallel.DistributedDataParallel(student))
        assert unwrap(wrapped) is student
    finally:
        torch.distributed.destroy_process_group()


def test_a_wrapper_that_holds_itself_does_not_hang(student):
    holder = nn.Module()
    holder.__dict__["module"] = holder
    with pytest.raises(ec.EditCompileError, match=r"Module is not converted; edit_compile\.linearize"):
        unwrap(holder)
    holder.__dict__["model"] = student
    assert unwrap(holder) is student


def test_it_is_the_only_attribute_that_conversion_adds(base, student):
    assert vars(student).keys() - vars(base).keys() == {"edit_conversion"}
    for path, site in converted_sites(student).items():
        assert site.edit_conversion is student.edit_conversion
        assert vars(site).keys() - vars(base.get_submodule(path)).keys() == {
            "edit_conversion",
            "edit_grid_index",
            "edit_path",
            "edit_names",
            "_edit_teacher",
        }


def test_a_copy_has_a_handle_of_its_own(student):
    for twin in (copy.deepcopy(student), copy.deepcopy(copy.deepcopy(student))):
        assert twin.edit_conversion is not student.edit_conversion
        assert twin.edit_conversion.plan is student.edit_conversion.plan
        assert all(site.edit_conversion is twin.edit_conversion for site in converted_sites(twin).values())
        assert torch.equal(call(twin), call(student))


def test_the_class_keeps_its_name_and_the_forward_its_signature(base, student):
    assert isinstance(student, toy.Toy)
    assert (type(student).__name__, type(student).__module__) == ("Toy", "toy")
    assert not hasattr(student, "save_pretrained")
    assert torch.equal(student.forward(**toy.inputs(2, 10, 14, 5, 3)), student(**toy.inputs(2, 10, 14, 5, 3)))


def spawn(model):
    multiprocessing.get_context("spawn").Process(target=print, args=(model,)).start()


@pytest.mark.parametrize(
    "write", [pickle.dumps, lambda model: torch.save(model, io.BytesIO()), lambda model: pickle.dumps(model.blocks[0]), spawn]
)
def test_pickling_is_refused_and_says_what_to_do(student, write):
    with pytest.raises(ec.EditCompileError, match=r"cannot be pickled.*edit_compile\.save"):
        write(student)


def test_a_state_dict_is_written_and_read_like_any_other(base, student):
    """Weights that are shared with the original are lazy copies: to read them is not to write to them."""
    file = io.BytesIO()
    torch.save(student.state_dict(), file)
    again, pickled = torch.load(io.BytesIO(file.getvalue())), pickle.loads(pickle.dumps(student.state_dict()))
    for name, tensor in student.state_dict().items():
        assert torch.equal(again[name], tensor)
        assert torch.equal(pickled[name], tensor)
    with ec.teacher(student):
        assert torch.equal(call(student), call(base))


def test_the_handle_itself_can_be_pickled(student):
    again = pickle.loads(pickle.dumps(student.edit_conversion))
    assert again.plan == student.edit_conversion.plan
