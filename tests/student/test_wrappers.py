"""What users wrap around a model works around a converted one: offloading, adapters, checkpointing, DDP, FSDP2."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

import edit_compile as ec
import toy
from edit_compile.student.handle import conversion_of
from edit_compile.student.site import converted_sites
from families import FAMILIES

pytestmark = pytest.mark.usefixtures("compiled_once")


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.fixture(scope="module", params=["sd3", "flux"])
def family(request):
    model, inputs = FAMILIES[request.param]()
    return model, inputs, ec.plan(model, example_inputs=inputs)


@pytest.fixture
def model(family):
    return family[0]


@pytest.fixture
def inputs(family):
    return family[1]


@pytest.fixture
def student(family):
    torch.manual_seed(0)
    return ec.linearize(family[0], plan=family[2])


@torch.no_grad()
def both(student, inputs):
    """Student's and teacher's outputs."""
    after = first(student(**inputs))
    with ec.teacher(student):
        return after, first(student(**inputs))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
def test_accelerates_offloading_to_meta_leaves_student_and_teacher_as_they_are(student, inputs):
    expected = both(student, inputs)
    cpu_offload(student, execution_device=torch.device("cpu"))
    assert {p.device.type for p in student.parameters()} == {"meta"}
    assert same(both(student, inputs), expected)


def test_group_offloading_leaves_student_and_teacher_as_they_are(student, inputs):
    expected = both(student, inputs)
    student.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level")
    assert same(both(student, inputs), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # is deprecated
def test_torchscript_is_not_converted():
    inputs = {"input": torch.zeros(2, 2)}
    for made in (torch.jit.script(nn.Linear(2, 2)), torch.jit.trace(nn.Linear(2, 2), torch.zeros(2, 2))):
        with pytest.raises(ec.RewriteError, match=r"^\w+ is TorchScript: convert the module that it was made from$"):
            ec.plan(made, example_inputs=inputs)
        with pytest.raises(ec.RewriteError, match=r"^0 is TorchScript"):
            ec.plan(nn.Sequential(made), example_inputs=inputs)


def test_an_offloaded_model_is_not_converted_and_not_saved(family, student, tmp_path):
    model, _, plan = family
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    with pytest.raises(ec.RewriteError, match="its forward was replaced, as by CPU offloading; convert first"):
        ec.linearize(offloaded, plan=plan)
    cpu_offload(student, execution_device=torch.device("cpu"))
    with pytest.raises(ec.CheckpointError, match=r"has no values \(meta device\)"):
        ec.save(student, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_the_teachers_weights_follow_what_it_is_given(student, inputs):
    """As under mixed precision with shards, where the student's weights are cast on the way and the teacher's are not."""
    site = next(iter(converted_sites(student).values()))
    x = torch.randn(2, 5, next(site.edit_teacher.parameters()).shape[-1])
    seen = []
    site.edit_teacher.forward = lambda x: None
    site.edit_teacher.register_forward_pre_hook(lambda module, args: seen.append(next(module.parameters()).dtype))
    site.edit_teacher_forward(x.to(torch.bfloat16))
    site.edit_teacher_forward(x)
    assert seen == [torch.bfloat16, torch.float32]


def test_a_lora_acts_on_untouched_layers_and_inside_sites(student, inputs):
    expected = both(student, inputs)
    student.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_out"]))
    assert same(both(student, inputs), expected)  # a fresh one is zero
    first(student(**inputs)).square().mean().backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
    inside = tuple(f"{path}.to_q.lora_" for path in converted_sites(student))
    assert all("lora" in name for name in gradients)
    assert any(name.startswith(inside) and gradient.abs().sum() > 0 for name, gradient in gradients.items())
    assert any(not name.startswith(inside) and gradient.abs().sum() > 0 for name, gradient in gradients.items())


def test_attention_processors_and_fusing_are_refused_by_name(student, inputs):
    expected = both(student, inputs)
    names = set(student.state_dict())
    path, site = next(iter(converted_sites(student).items()))
    with pytest.raises(ec.RewriteError, match=rf"{path} is converted: setting its processor would have no effect.*convert that again"):
        site.set_processor(type("Other", (), {"__call__": lambda self: None})())
    with pytest.raises(ec.RewriteError, match=r"setting its to_(added_)?qkv would have no effect"):
        student.fuse_qkv_projections()
    assert set(student.state_dict()) == names
    assert same(both(student, inputs), expected)


class OwnWeights(nn.Module):
    """A processor with weights, as IP-Adapter's."""

    def __call__(self, *args, **kwargs):
        raise AssertionError("it is not called")


def test_processors_with_weights_are_refused_by_name(student, inputs):
    """Once there is one, another of the same class may take its place, and none other."""
    expected = both(student, inputs)
    site = next(iter(converted_sites(student).values()))
    for processor in (OwnWeights(), nn.Identity()):
        with pytest.raises(ec.RewriteError, match="setting its processor would have no effect"):
            site.set_processor(processor)
    plain = vars(site).pop("processor")
    with pytest.raises(ec.RewriteError, match="setting its processor would have no effect"):
        site.processor = plain
    vars(site)["processor"] = plain
    site.to_q = torch.compile(site.to_q, backend="eager")
    assert same(both(student, inputs), expected)


@pytest.mark.parametrize("family", ["flux"], indirect=True)
def test_an_attention_backend_chosen_for_a_model_is_put_aside_while_it_is_captured(family):
    """FlexAttention hides attention from the graph, and takes no masks."""
    model, inputs, plan = family
    chosen = copy.deepcopy(model)
    with attention_backend("native"):  # puts back what is chosen for all models, which the model's method changes too
        chosen.set_attention_backend("flex")
        found = ec.plan(chosen, example_inputs=inputs)
        assert {module.processor._attention_backend for module in chosen.modules() if hasattr(module, "processor")} == {"flex"}
    assert [(site.path, site.action) for site in found.rewritten] == [(site.path, site.action) for site in plan.rewritten]


def test_quantized_linears_are_called(student, inputs):
    expected = both(student, inputs)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its move to another package
        frozen = copy.deepcopy(student).requires_grad_(False)
        quantized = torch.ao.quantization.quantize_dynamic(frozen, {nn.Linear}, dtype=torch.qint8)
        got = both(quantized, inputs)[0]
    error = (got - expected).square().mean().sqrt() / expected.std()
    assert 0 < error < 0.05


@pytest.mark.parametrize("context", ["inference_mode", "autocast"])
def test_inference_mode_and_autocast(student, inputs, context):
    expected = both(student, inputs)
    with torch.inference_mode() if context == "inference_mode" else torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own RMSNorm warns about mixed precision
        got = both(student, {k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()})
    errors = [(a.float() - b).abs().max().item() for a, b in zip(got, expected, strict=True)]
    assert errors[0] <= (0 if context == "inference_mode" else 3 * errors[1])


def test_diffusers_gradient_checkpointing_gives_the_same_gradients(student, inputs):
    def gradients():
        student.zero_grad()
        first(student(**inputs)).square().mean().backward()
        return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    without = gradients()
    student.train().enable_gradient_checkpointing()
    with_it = gradients()
    assert any(".edit." in name for name in without)
    assert without.keys() == with_it.keys()
    assert all(torch.equal(with_it[name], gradient) for name, gradient in without.items())


def test_save_pretrained_writes_a_folder_that_both_libraries_read(model, student, inputs, tmp_path):
    toy.shaken(nn.ModuleList(converted_sites(student).values()), amount=0.1)
    student.save_pretrained(tmp_path)
    expected = both(student, inputs)
    original = type(model).from_pretrained(tmp_path)
    assert torch.equal(first(original(**inputs)), expected[1])
    loaded = ec.load(tmp_path)
    assert same(both(loaded, inputs), expected)
    copy.deepcopy(loaded).save_pretrained(tmp_path / "again")
    assert same(both(ec.load(tmp_path / "again"), inputs), expected)


@pytest.mark.slow
def test_two_grids_of_equal_count_are_told_apart_whatever_memory_their_ids_get():
    model, inputs = FAMILIES["flux"]()
    student = ec.linearize(model, plan=ec.plan(model, example_inputs=inputs))
    source = conversion_of(student).runtime.source
    for height, width in [(5, 7), (7, 5), (35, 1)] * 3:
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float()
        assert source.sizes(student, (), {"img_ids": ids}, None) == (((height, width),),)
        del ids
    with ec.grid(student, 4, 4), pytest.raises(ec.GridError, match=r"stated as 4 x 4 = 16, but there are 35 image tokens"):
        student(**inputs)


@pytest.fixture(scope="module")
def small():
    base = toy.shaken(toy.Toy(joint=True).eval())
    return base, ec.plan(base, example_inputs=toy.inputs(text=5))


def test_checkpointed_blocks_get_the_grid_of_their_forward_from_a_loss_on_a_site(small):
    """As when features are distilled: no gradient passes through the model's output."""
    student = ec.linearize(small[0], plan=small[1])
    kept = []
    student.blocks[0].attn.register_forward_hook(lambda module, args, output: kept.append(output))

    def gradients(checkpointing):
        student.gradient_checkpointing = checkpointing
        student.zero_grad()
        kept.clear()
        for height, width in ((8, 12), (12, 8)):
            student(**toy.inputs(2, height, width, 5, 3))
        (kept[0].square().mean() + kept[1].square().mean()).backward()
        return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    without, with_it = gradients(False), gradients(True)
    for name, gradient in without.items():
        torch.testing.assert_close(with_it[name], gradient, atol=1e-6, rtol=1e-4)


DISTRIBUTED = """
import sys
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
import edit_compile as ec, toy

kind, folder, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/{kind}", rank=rank, world_size=2)
base = toy.Toy(joint=True).eval()
base.load_state_dict(load_file(f"{folder}/base"))
student = ec.load(f"{folder}/student", base)
single = ec.load(f"{folder}/student", base)
whole = toy.inputs(4, 10, 14, 5, 3)
mine = {name: value[2 * rank : 2 * rank + 2] for name, value in whole.items()}
if kind == "ddp":
    wrapped = DistributedDataParallel(student)
else:
    for block in student.blocks:
        fully_shard(block)
    wrapped = fully_shard(student)
single(**whole).square().mean().backward()
wrapped(**mine).square().mean().backward()
expected = {name: p.grad for name, p in single.named_parameters() if p.grad is not None}
got = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
assert expected.keys() == got.keys()
for name, gradient in got.items():
    gradient = gradient.full_tensor() if kind == "fsdp" else gradient
    torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)
with torch.no_grad(), ec.teacher(wrapped):
    torch.testing.assert_close(wrapped(**mine), base(**mine), atol=1e-5, rtol=1e-5)
ec.save(student, f"{folder}/{kind}-saved")
dist.barrier()
loaded = ec.load(f"{folder}/{kind}-saved", base)
assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in single.state_dict().items())
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_processes_give_the_gradients_the_teacher_and_the_checkpoint_of_one(small, tmp_path, kind):
    base, plan = small
    save_file(base.state_dict(), tmp_path / "base")
    student = ec.linearize(base, plan=plan)
    toy.shaken(nn.ModuleList(converted_sites(student).values()), amount=0.1)
    ec.save(student, tmp_path / "student")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", DISTRIBUTED, kind, str(tmp_path)]
    running = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=150)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(outputs)
