"""Weights outside the sites are shared with the original until one of the two is written to, in whatever way; no write is lost."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize

import edit_compile as ec
import toy
from edit_compile.student.site import converted_sites
from edit_compile.torch_internals import is_lazy_copy, lazy_copies, memory_id, watch_writes

pytestmark = pytest.mark.usefixtures("compiled_once")


class Counted(toy.Toy):
    """With buffers that its output depends on, one of them in no state dict."""

    def __init__(self):
        super().__init__(joint=True)
        self.register_buffer("level", torch.full((12,), 0.5))
        self.register_buffer("table", torch.ones(4), persistent=False)
        self.register_buffer("repeated", torch.ones(1).expand(4, 4), persistent=False)

    def forward(self, x, text=None, text_mask=None):
        return super().forward(x, text, text_mask) * self.level.mean() * self.table.sum()


@pytest.fixture(scope="module")
def plan():
    return ec.plan(made(), example_inputs=toy.inputs(text=5))


def made():
    return toy.shaken(Counted().eval())


@pytest.fixture
def base():
    return made()


@pytest.fixture
def student(base, plan):
    student = ec.linearize(base, plan=plan)
    toy.shaken(nn.ModuleList(converted_sites(student).values()), seed=7)
    return student


@torch.no_grad()
def call(model):
    return model(**toy.inputs(2, 10, 14, 5, 3))


def fused(model):
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["ff.0", "out"], init_lora_weights=False))
    wrapped.merge_and_unload()


def trained(model):
    model.requires_grad_(True)
    model(**toy.inputs(2, 10, 14, 5, 3)).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@torch.no_grad()
def one_value(model):
    model.text.weight[1, 2] += 0.25


@torch.no_grad()
def exchanged(model):
    model.text.weight[[2, 3]] = model.text.weight[[3, 2]]


WRITES = {
    "LoRA is fused": fused,
    "a state dict is loaded": lambda model: model.load_state_dict({name: 1.01 * p for name, p in model.named_parameters()}, strict=False),
    "a part's is": lambda model: model.out.load_state_dict({name: t + 0.01 for name, t in model.out.state_dict().items()}),
    "training": trained,
    "data": lambda model: model.patch.bias.data.mul_(1.001),
    "data is set": lambda model: setattr(model.out.bias, "data", model.out.bias.data + 1),
    "one value": one_value,
    "rows in another order": exchanged,
    "a new parameter": lambda model: setattr(model.out, "weight", nn.Parameter(model.out.weight.detach().neg())),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("moved", [False, True])
def test_what_is_written_to_the_student_is_its_own_and_saved_and_no_teacher(base, student, tmp_path, write, moved):
    student = student.to(torch.float64).float() if moved else student
    original, before = call(base), call(student)
    with ec.teacher(student):
        assert torch.equal(call(student), original)
    write(student)
    assert torch.equal(call(base), original)
    assert not torch.equal(call(student), before)
    with (
        pytest.raises(ec.EditCompileError, match=r"outside the converted sites were written to; call edit_compile\.unshare"),
        ec.teacher(student),
    ):
        pass
    ec.save(student, tmp_path)
    loaded = ec.load(tmp_path, base)
    assert torch.equal(call(loaded), call(student))
    with ec.teacher(loaded):
        assert torch.equal(call(loaded), original)


@pytest.mark.parametrize("write", [fused, trained, one_value])
def test_what_is_written_to_the_original_does_not_reach_the_student(base, student, write):
    original, before = call(base), call(student)
    write(base)
    assert not torch.equal(call(base), original)
    assert torch.equal(call(student), before)
    with ec.teacher(student):
        assert torch.equal(call(student), original)


def test_unshared_first_all_may_be_written_and_the_teacher_is_the_original(base, student, tmp_path):
    original = call(base)
    ec.unshare(student)
    fused(student)
    with ec.teacher(student):
        assert torch.equal(call(student), original)
    ec.save(student, tmp_path)
    assert torch.equal(call(ec.load(tmp_path, base)), call(student))


def test_what_was_written_before_is_no_original(base, student, tmp_path):
    """Neither for `unshare` nor for `merge_lora`, which keep the original weights; saved and loaded, it is told from them."""
    ec.add_lora(student, 1, targets=["text"])
    student.text.base_layer.weight.data[1, 2] += 0.25
    with pytest.raises(ec.EditCompileError, match=r"text\.weight were written to since the conversion"):
        ec.merge_lora(student)
    ec.save(student, tmp_path)
    student = ec.load(tmp_path, base)
    assert ec.merge_lora(student) == ["text.weight"]
    ec.unshare(student)
    with ec.teacher(student):
        assert torch.equal(call(student), call(base))
    plain = ec.linearize(base, plan=ec.plan_of(student))
    fused(plain)
    with pytest.raises(ec.EditCompileError, match=r"out\.weight were written to before.*save the student, load it"):
        ec.unshare(plain, ["out.*", "blocks.0.norm.*"])
    ec.unshare(plain, ["blocks.0.norm.*"])


def test_a_written_buffer_is_not_lost_in_silence(base, student, tmp_path):
    student.level.fill_(2)
    assert torch.equal(base.level, torch.full((12,), 0.5))
    with pytest.raises(ec.CheckpointError, match="level was written to, and is a buffer"):
        ec.save(student, tmp_path)
    student.level.fill_(0.5)
    ec.save(student, tmp_path)


@pytest.mark.parametrize("moved", [False, True])
def test_what_is_written_into_a_buffer_of_no_state_dict_is_no_teachers_and_not_lost_in_silence(base, student, tmp_path, moved):
    student = student.to(torch.float64).float() if moved else student
    student.table.fill_(2)
    with pytest.raises(ec.EditCompileError, match=r"original model: table outside .* were written to"), ec.teacher(student):
        pass
    with pytest.raises(ec.CheckpointError, match="table was written to, and is a buffer"):
        ec.save(student, tmp_path)
    student.table.fill_(1)
    with ec.teacher(student):
        assert torch.equal(call(student), call(base))
    student.table = torch.ones(6)  # as models do for other sizes
    ec.save(student, tmp_path)


def test_casts_and_moves_are_no_writes_and_do_not_hide_one(base, student, tmp_path):
    for model in (copy.deepcopy(student).to(torch.bfloat16), copy.deepcopy(student).half().float(), student.to("cpu")):
        with ec.teacher(model):
            call(model) if next(model.parameters()).dtype == torch.float32 else None
        ec.save(model, tmp_path)
        assert not [name for name in load_file(next(tmp_path.glob("*.safetensors"))) if ".attn." not in name]
    one_value(student)
    ec.save(student.to(torch.bfloat16), tmp_path)
    assert [name for name in load_file(next(tmp_path.glob("*.safetensors"))) if ".attn." not in name] == ["text.weight"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_part_that_is_cast_to_a_finer_dtype_is_the_same_until_it_is_written_to(base, plan, tmp_path, dtype):
    student = ec.linearize(base.to(dtype), plan=plan)
    student.text.float()
    with ec.teacher(student):
        pass
    with torch.no_grad():
        student.text.weight[1, 2] *= 1 + 1e-6  # which the coarser dtype could not tell
    with pytest.raises(ec.EditCompileError, match=r"text\.weight outside the converted sites were written to"), ec.teacher(student):
        pass
    ec.save(student, tmp_path)
    assert [name for name in load_file(next(tmp_path.glob("*.safetensors"))) if ".attn." not in name] == ["text.weight"]


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class Adapted(nn.Module):
    """LoRA as others write it."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.down = linear, nn.Linear(linear.in_features, linear.out_features)

    def forward(self, x):
        return self.linear(x) + self.down(x)


class Patched(nn.Module):
    """LoRA that puts its own forward in the place of a module's, which it does not hold."""

    def __init__(self, linear):
        super().__init__()
        self.down, self.plain = nn.Linear(linear.in_features, linear.out_features), linear.forward
        linear.forward = self.forward

    def forward(self, x):
        return self.plain(x) + self.down(x)


def test_the_teacher_is_no_model_whose_forwards_are_those_of_other_modules(base, student):
    before = call(student)
    patched = Patched(student.out)
    assert not torch.equal(call(student), before)
    with pytest.raises(ec.EditCompileError, match=r"original model: out outside .* runs another module's forward"), ec.teacher(student):
        pass
    student.out.forward = patched.plain
    with ec.teacher(student):
        assert torch.equal(call(student), call(base))


@pytest.mark.parametrize("change", ["module", "parametrization", "part"])
def test_the_teacher_is_no_model_whose_modules_were_replaced(base, student, tmp_path, change):
    if change == "module":
        student.out = Adapted(student.out)
    elif change == "parametrization":
        parametrize.register_parametrization(student.out, "weight", Doubled())
    else:
        student.blocks = student.blocks[:1]
    assert not torch.equal(call(base), call(student))
    gone = r"blocks\.1\." if change == "part" else r"out\.weight"
    with pytest.raises(ec.EditCompileError, match=rf"{gone}.* outside the converted sites is not where it was"), ec.teacher(student):
        pass
    with pytest.raises(ec.CheckpointError, match="not as it was at conversion"):
        ec.save(student, tmp_path)


def test_modules_behind_wrappers_are_where_they_were(base, student):
    student.out = torch.compile(student.out, backend="eager")
    student.text = checkpoint_wrapper(student.text)
    with ec.teacher(student):
        assert torch.equal(call(student), call(base))


def test_what_another_library_reads_by_its_address_was_not_written_to(base, student, tmp_path):
    """As compiled code does, and safetensors: that ends the sharing, and changes nothing."""
    for parameter in student.parameters():
        parameter.data_ptr()
    assert not is_lazy_copy(student.out.weight)
    with ec.teacher(student):
        assert torch.equal(call(student), call(base))
    ec.save(student, tmp_path)
    assert not [name for name in load_file(next(tmp_path.glob("*.safetensors"))) if ".attn." not in name]


def test_weights_of_a_mapped_file_are_copied(base, plan, tmp_path):
    save_file(base.state_dict(), tmp_path / "weights")
    base.load_state_dict(load_file(tmp_path / "weights"), assign=True)
    student, original = ec.linearize(base, plan=plan), call(base)
    fused(student)
    assert torch.equal(call(base), original)
    with pytest.raises(ec.EditCompileError, match="were written to"), ec.teacher(student):
        pass


# ------------------------------------------------------------------ lazy copies


def test_tensors_that_share_memory_go_on_sharing_it():
    whole = torch.randn(4, 6)
    part = whole[1:3].t()
    copied, copied_part = lazy_copies([whole, part])
    assert torch.equal(copied_part, part)
    assert memory_id(copied) == memory_id(copied_part) != memory_id(whole)
    copied.zero_()
    assert not copied_part.any()
    assert whole.all()
    assert is_lazy_copy(whole)
    assert not is_lazy_copy(copied_part)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(0),
        torch.tensor(3),
        torch.randn(3, dtype=torch.complex64),
        torch.ones(3, dtype=torch.bool),
        torch.empty(3, device="meta"),
    ],
    ids=["empty", "one", "complex", "bool", "meta"],
)
def test_every_tensor_can_be_copied(tensor):
    (copied,) = lazy_copies([tensor])
    assert (copied.shape, copied.dtype, copied.device) == (tensor.shape, tensor.dtype, tensor.device)
    assert tensor.is_meta or torch.equal(copied, tensor)


class Odd(toy.Toy):
    """With tensors that are not plain numbers in memory."""

    def __init__(self):
        super().__init__(joint=True)
        self.register_buffer("turn", torch.polar(torch.ones(4), torch.arange(4.0)).conj())
        self.register_buffer("negative", self.turn.imag)
        self.register_buffer("few", torch.eye(3).to_sparse())


def test_views_with_a_sign_of_their_own_and_sparse_tensors_are_copied():
    base = toy.shaken(Odd().eval())
    assert base.turn.is_conj()
    assert base.negative.is_neg()
    student = ec.linearize(base, example_inputs=toy.inputs(text=5))
    for model in (student, student.to("cpu")):
        for name in ("turn", "negative", "few"):
            assert torch.equal(getattr(model, name).to_dense(), getattr(base, name).to_dense())


def test_watched_memory_stays_where_it_is():
    weight, mapped = nn.Parameter(torch.randn(3)), torch.randn(3).share_memory_()
    place = weight.data_ptr()
    watch_writes([weight, mapped])
    assert is_lazy_copy(weight)
    assert mapped.is_shared()
    weight.data.zero_()
    assert not is_lazy_copy(weight)
    assert weight.data_ptr() == place


# ------------------------------------------------------------------ adapters


TARGETS = ["to_q", "to_v", "ff.0", "out"]


def adapted(model, **options):
    inject_adapter_in_model(LoraConfig(r=2, target_modules=TARGETS, **options), model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                generator = torch.Generator().manual_seed(sum(name.encode()))
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_the_teacher_is_the_original_or_the_original_with_the_adapters(base, student, options):
    original, with_lora = call(base), call(adapted(copy.deepcopy(base), **options))
    plain = call(student)
    adapted(student, **options)
    of_student = call(student)
    assert not torch.equal(of_student, plain)
    with ec.teacher(student):
        assert torch.equal(call(student), original)
        with ec.teacher(student, adapters=True):
            torch.testing.assert_close(call(student), with_lora)
    with ec.teacher(student, adapters=True):
        torch.testing.assert_close(call(student), with_lora)
    assert torch.equal(call(student), of_student)


def test_adapters_on_what_conversion_added_are_not_the_originals(base, student):
    """`all-linear` finds Linears in the designs' modules too."""
    plain = call(base)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=r".*\.(reduce|restore|to_q)"), student)
    with ec.teacher(student, adapters=True):
        assert torch.equal(call(student), plain)


def test_modules_that_peft_trains_whole_are_left_out_too(base, student):
    wrapped = get_peft_model(student, LoraConfig(r=2, target_modules=["ff.0"], modules_to_save=["text"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1)
    assert not torch.equal(call(wrapped), call(base))
    with ec.teacher(wrapped):
        assert torch.equal(call(wrapped), call(base))


def test_merged_adapters_are_no_part_of_the_original(base, student):
    adapted(student)
    student.out.merge()
    with pytest.raises(ec.EditCompileError, match=r"out\.weight outside the converted sites were written to"), ec.teacher(student):
        pass
    student.out.merged_adapters.clear()


def test_an_adapter_on_an_unshared_student_is_left_out_too(base, student):
    ec.unshare(student)
    toy.shaken(student.out)
    adapted(student)
    with ec.teacher(student):
        assert torch.equal(call(student), call(base))


@pytest.mark.parametrize("wrap", [adapted, lambda model: get_peft_model(model, LoraConfig(r=2, target_modules=["to_q"]))])
def test_a_model_with_adapters_is_not_converted(base, student, plan, tmp_path, wrap):
    ec.save(student, tmp_path)
    wrapped = wrap(base)
    for convert in (
        lambda: ec.plan(wrapped, example_inputs={}),
        lambda: ec.linearize(wrapped, plan=plan),
        lambda: ec.load(tmp_path, base),
    ):
        with pytest.raises(ec.RewriteError, match=r"the model has adapters \(LoRA\), as at .*to_q.*pipe\.fuse_lora"):
            convert()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"lora\.rank: Input should be greater than 0"),
        ({"rank": 2.5}, r"lora\.rank: Input should be a valid integer"),
        ({"rank": 1, "alpha": 0.0}, r"lora\.alpha: Input should be greater than 0"),
        ({"rank": 1, "alpha": float("inf")}, r"lora\.alpha: Input should be a finite number"),
    ],
)
def test_impossible_lora_is_refused_before_anything_is_changed(student, options, message):
    names = set(student.state_dict())
    with pytest.raises(ec.ConfigError, match=message):
        ec.add_lora(student, **options)
    assert set(student.state_dict()) == names


def test_loras_files_for_others_are_never_those_of_another_checkpoint(student, tmp_path, monkeypatch):
    """Whenever a save is cut short, they are the checkpoint's or not there."""
    ec.add_lora(student, 2, 4.0)
    ec.save(student, tmp_path)

    def alpha(folder):
        config = folder / "lora" / "adapter_config.json"
        return json.loads(config.read_text())["lora_alpha"] if config.exists() else None

    assert alpha(tmp_path) == 4
    student.edit_conversion.lora = student.edit_conversion.lora.model_copy(update={"alpha": 8.0})
    real, seen = os.replace, []

    def replace(last, source, place):
        seen.append((json.loads((tmp_path / "edit_compile.json").read_text())["lora"]["alpha"], alpha(tmp_path)))
        if str(place).endswith(last):
            raise KeyboardInterrupt
        real(source, place)

    for last, after in (("edit_compile.json", 4), ("adapter_config.json", None), ("nothing", 8)):
        monkeypatch.setattr(os, "replace", functools.partial(replace, last))
        with contextlib.suppress(KeyboardInterrupt):
            ec.save(student, tmp_path)
        assert alpha(tmp_path) == after
    assert all(found in (None, stated) for stated, found in seen)


# ------------------------------------------------------------------ quantized weights


class Quantized(torch.Tensor):
    """A weight of 8 bits, of which a few operators alone know."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("detach", "clone", "alias", "_to_copy"):
            return cls(args[0].numbers, args[0].scale)
        if name in ("t", "mm", "addmm", "linear"):
            return func(*[each.numbers * each.scale if isinstance(each, cls) else each for each in args], **(kwargs or {}))
        raise NotImplementedError(name)


def quantize(linear):
    scale = linear.weight.detach().abs().max() / 127
    numbers = (linear.weight.detach() / scale).round().to(torch.int8)
    linear.weight = nn.Parameter(Quantized(numbers, scale), requires_grad=False)


def test_a_student_quantized_in_its_sites_is_not_saved_and_outside_of_them_it_is(base, student, tmp_path):
    quantize(student.out)
    expected = call(student)
    ec.save(student, tmp_path)
    loaded = ec.load(tmp_path, base)
    quantize(loaded.out)
    assert torch.equal(call(loaded), expected)
    quantize(student.blocks[1].attn.to_out)
    with pytest.raises(ec.CheckpointError, match=r"blocks\.1\.attn\.to_out\.weight is quantized \(Quantized\): save the student before"):
        ec.save(student, tmp_path)


def test_quantized_weights_that_would_be_trained_are_not_converted(base, plan):
    quantize(base.out)
    student = ec.linearize(base, plan=plan)
    with ec.teacher(student):
        assert torch.equal(call(student), call(base))
    quantize(base.blocks[0].attn.to_q)
    with pytest.raises(ec.RewriteError, match=r"blocks\.0\.attn\.to_q\.weight is quantized \(Quantized\).*before it is quantized"):
        ec.linearize(base, plan=plan)
