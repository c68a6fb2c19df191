"""Models of runs that shard them stay in their files until they are sharded, and then have the same values as any."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import edit_compile as ec
import toy_distill
from edit_compile.adapters.load_model import load_model
from edit_compile.api import repeated_blocks
from edit_compile.distillation.context import trained_parameters
from edit_compile.distillation.models import make_student, unshare_blocks
from edit_compile.distillation.train.distributed import set_precision
from edit_compile.student.site import converted_sites


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A small model's folders, by the dtype of its files, and a converted folder of each."""
    folder, found = tmp_path_factory.mktemp("stored"), {}
    model = load_model("demo/dit").model
    student = ec.linearize(model)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).rpartition(".")[2]
        model.to(dtype).save_pretrained(folder / name)
        found[name] = str(folder / name)
    with torch.no_grad():
        for parameter in (p for site in converted_sites(student).values() for p in site.parameters()):
            parameter.mul_(1.01)
    for name in list(found):
        ec.save(student, folder / f"{name}-converted", base=found[name])
        found[f"{name}-converted"] = str(folder / f"{name}-converted")
    return found


FILES = ("float32", "bfloat16", "float32-converted", "bfloat16-converted")
CASES = list(itertools.product(FILES, ("fp32", "bf16"), ("attention", "blocks")))


@pytest.mark.parametrize(
    ("name", "precision", "trained"),
    [pytest.param(*case, marks=[] if case == ("float32", "bf16", "blocks") else pytest.mark.slow) for case in CASES],
)
def test_what_is_loaded_for_shards_stays_in_its_files_until_then_and_comes_out_the_same(stored, name, precision, trained):
    recipe = toy_distill.recipe(model=stored[name], data={"kind": "random"}, precision=precision, train=trained)
    one, many = (make_student(recipe, other_data=True, for_shards=for_shards) for for_shards in (False, True))
    if trained == "blocks":
        unshare_blocks(one.model)
        unshare_blocks(many.model, read_only=True)
    added = {name for name, _ in many.model.named_parameters() if ".edit." in name}
    elsewhere = {name for name, tensor in tensors_of(many.model).items() if not is_mapped(tensor)}
    assert elsewhere <= (set() if "converted" in name else added)
    for student in (one, many):
        names = trained_parameters(student.model, trained)
        for path in (*repeated_blocks(student.model), ""):
            set_precision(student.model, names, precision, path, student.loaded_in)
    first, second = tensors_of(one.model), tensors_of(many.model)
    assert {name: t.dtype for name, t in first.items()} == {name: t.dtype for name, t in second.items()}
    assert all(torch.equal(first[name], second[name]) for name in first)


def tensors_of(model):
    """All parameters and buffers by name, those of the sites' teachers too."""
    parts = {"": model} | {f"{path} teacher ": site.edit_teacher for path, site in converted_sites(model).items()}
    return {part + name: t for part, m in parts.items() for name, t in (*m.named_parameters(), *m.state_dict(keep_vars=True).items())}


def is_mapped(tensor):
    """Whether a tensor's memory is of a mapped file."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(each, 16) for each in line.split()[0].split("-"))
        if first <= address < last:
            return "safetensors" in line
    return False
