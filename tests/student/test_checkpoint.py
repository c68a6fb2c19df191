"""Checkpoints: exact, small, strict, and never half-written."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

import edit_compile as ec
import toy
from edit_compile.adapters import hub_access
from edit_compile.adapters.load_model import load_model
from edit_compile.files import sha256
from edit_compile.student.checkpoint_format import INDEX
from edit_compile.student.fingerprint import TensorPrint, difference, fingerprint
from edit_compile.student.site import converted_sites
from edit_compile.student.weights import original_state, trained_tensors

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def base():
    return toy.shaken(toy.Toy(joint=True).eval())


@pytest.fixture(scope="module")
def plan(base):
    return ec.plan(base, example_inputs=toy.inputs(text=5))


@pytest.fixture
def student(base, plan):
    student = ec.linearize(base, plan=plan)
    toy.shaken(nn.ModuleList(converted_sites(student).values()), seed=7)
    return student


@pytest.fixture
def folder(student, tmp_path):
    ec.save(student, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def call(model):
    with torch.no_grad():
        return model(**toy.inputs(2, 10, 14, 5, 3))


def change(folder, **entries):
    path = folder / INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_round_trip_is_bit_for_bit(student, base, folder):
    loaded = ec.load(folder, base)
    assert torch.equal(call(loaded), call(student))
    assert ec.plan_of(loaded) == ec.plan_of(student)
    with ec.teacher(loaded):
        assert torch.equal(call(loaded), call(base))


@pytest.mark.skipif(os.name == "nt", reason="permissions are those of POSIX")
def test_files_have_the_umasks_permissions(student, tmp_path):
    before = os.umask(0o027)
    try:
        ec.save(student, tmp_path / "saved")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    assert (tmp_path / "saved").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_round_trip_is_bit_for_bit(student, base, tmp_path, dtype):
    half = copy.deepcopy(student).to(dtype)
    ec.save(half, tmp_path)
    loaded = ec.load(tmp_path, copy.deepcopy(base).to(dtype))
    expected, got = half.state_dict(), loaded.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], tensor) and got[name].dtype is dtype for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_base_in_half_precision_is_the_same_base(folder, base, dtype):
    ec.load(folder, copy.deepcopy(base).to(dtype))


def test_it_holds_only_what_was_added_or_trained(student, folder):
    names = trained_tensors(student)
    assert all(".attn." in name for name in names)
    assert sorted(p.name.split("-")[0] for p in folder.iterdir()) == ["edit_compile", "edit_compile.json"]
    size = sum(t.numel() * t.element_size() for t in names.values())
    assert sum(p.stat().st_size for p in folder.glob("*.safetensors")) < size + 10_000


def test_the_checkpoint_of_the_demo_model_is_the_difference_and_knows_its_base(tmp_path):
    model = load_model("demo/mm-dit").model
    student = ec.linearize(model, plan=ec.plan(model, ec.LinearizeConfig(include=("transformer_blocks.0.*",))))
    ec.save(student, tmp_path, base="demo/mm-dit")
    (file,) = tmp_path.glob("*.safetensors")
    sites = tuple(f"{path}." for path in converted_sites(student))
    assert len(sites) == 2
    assert all(name.startswith(sites) for name in load_file(file))
    loaded = ec.load(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in student.state_dict().items())


def test_weights_trained_outside_the_sites_are_saved_and_leave_original_and_teacher_alone(student, base, tmp_path):
    original, expected = copy.deepcopy(base.state_dict()), call(base)
    assert ec.unshare(student, ["blocks.*.ff.0.weight"]) == ["blocks.0.ff.0.weight", "blocks.1.ff.0.weight"]
    assert "out.weight" in ec.unshare(student)
    student(**toy.inputs(2, 10, 14, 5, 3)).square().mean().backward()
    torch.optim.SGD(student.parameters(), lr=0.1).step()
    assert all(torch.equal(original[name], tensor) for name, tensor in base.state_dict().items())
    changed = [name for name, tensor in student.state_dict().items() if name in original and not torch.equal(original[name], tensor)]
    assert {"out.weight", "blocks.0.ff.0.weight", "blocks.0.attn.to_q.weight"} <= set(changed)
    for model in (student, copy.deepcopy(student)):
        trained = call(model)
        with ec.teacher(model), ec.teacher(model):
            assert torch.equal(call(model), expected)
        assert torch.equal(call(model), trained)
    ec.save(student, tmp_path)
    loaded = ec.load(tmp_path, base)
    assert torch.equal(call(loaded), call(student))
    with ec.teacher(loaded):
        assert torch.equal(call(loaded), expected)
    ec.save(loaded, tmp_path / "again")
    assert torch.equal(call(ec.load(tmp_path / "again", base)), call(student))


def test_unsharing_keeps_tied_weights_tied(base, plan):
    tied = copy.deepcopy(base)
    tied.blocks[1].ff = tied.blocks[0].ff
    student = ec.linearize(tied, plan=plan)
    ec.unshare(student)
    assert student.blocks[1].ff[0].weight is student.blocks[0].ff[0].weight
    assert student.blocks[0].ff[0].weight is not tied.blocks[0].ff[0].weight


def test_weights_outside_the_sites_are_frozen(student):
    assert {name.split(".attn.")[0] for name, p in student.named_parameters() if p.requires_grad} == {"blocks.0", "blocks.1"}


def test_adapters_are_not_saved_in_silence(student, tmp_path):
    adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), student)
    with pytest.raises(ec.CheckpointError, match=r"blocks\.0\.attn\.to_q\.base_layer.*unload or fuse"):
        ec.save(adapted, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(student, folder, base, value):
    expected = call(student)
    with torch.no_grad():
        student.blocks[1].attn.edit.key.conv.weight[3] = value
    with pytest.raises(ec.RewriteError, match=r"blocks\.1\.attn\.edit\.key\.conv\.weight holds NaN or infinity"):
        ec.save(student, folder)
    assert torch.equal(call(ec.load(folder, base)), expected)


def test_fingerprint_is_the_bases(base, student):
    of_base = fingerprint(base.state_dict())
    assert difference(of_base, fingerprint(original_state(student))) is None
    other = copy.deepcopy(base)
    toy.shaken(other.out, amount=0.1)
    assert difference(of_base, fingerprint(other.state_dict())) == "the values of its out.weight differ"
    for values in ((), of_base["out.weight"].values[:-1], (*of_base["out.weight"].values, 0.0)):
        damaged = of_base | {"out.weight": TensorPrint(shape=of_base["out.weight"].shape, values=values)}
        assert difference(damaged, of_base) == ("the values of its out.weight differ" if values else None)


def test_saving_again_replaces_and_cleans_up(student, base, folder):
    toy.shaken(nn.ModuleList(converted_sites(student).values()), seed=8)
    ec.save(student, folder)
    assert len(list(folder.iterdir())) == 2
    assert torch.equal(call(ec.load(folder, base)), call(student))


@pytest.mark.parametrize(("function", "call_number"), [("replace", 1), ("replace", 2), ("fsync", 1), ("fsync", 2), ("fsync", 3)])
def test_a_save_that_fails_leaves_the_previous_checkpoint(student, base, folder, monkeypatch, function, call_number):
    expected = call(student)
    toy.shaken(nn.ModuleList(converted_sites(student).values()), seed=9)
    real, calls = getattr(os, function), []

    def dies(*args):
        calls.append(args)
        if len(calls) == call_number:
            raise OSError("no space left on device")
        return real(*args)

    monkeypatch.setattr(os, function, dies)
    with pytest.raises(ec.CheckpointError, match=r"cannot be written: no space.*is as it was"):
        ec.save(student, folder)
    monkeypatch.undo()
    assert torch.equal(call(ec.load(folder, base)), expected)
    assert not [path for path in folder.iterdir() if path.is_dir()]


KILLED = """
import os, pathlib, random, signal, sys, time
import torch
import edit_compile as ec, toy
from edit_compile.student.checkpoint_format import read_index, read_tensors
from edit_compile.student.weights import trained_tensors
from safetensors.torch import load_file

folder = pathlib.Path(sys.argv[1])
base = toy.Toy(joint=True)
base.load_state_dict(load_file(sys.argv[2]))
student = ec.load(folder, base)
random.seed(0)
kept = set()
start = time.perf_counter()
ec.save(student, folder)
took = time.perf_counter() - start
for turn in range(25):
    child = os.fork()
    if child == 0:
        for value in range(1, 1000):
            with torch.no_grad():
                for parameter in trained_tensors(student).values():
                    parameter.fill_(1000 * turn + value)
            ec.save(student, folder)
    time.sleep(random.uniform(0, 6 * took))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    tensors = read_tensors(folder, read_index(folder))
    assert tensors.keys() == trained_tensors(student).keys()
    if turn or kept:
        kept.add(frozenset(v for t in tensors.values() for v in t.unique().tolist()))
print(max(map(len, kept)), len(kept))
"""


def test_a_save_that_is_killed_leaves_a_whole_checkpoint(folder, base, tmp_path):
    """Every save writes one number into all weights: a mixture of two saves would have two."""
    save_file(base.state_dict(), tmp_path / "base")
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(folder), str(tmp_path / "base")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert result.returncode == 0, result.stderr
    numbers, distinct = map(int, result.stdout.split())
    assert numbers == 1
    assert distinct > 2


def test_wrong_base(folder):
    with pytest.raises(ec.CheckpointError, match="made from another base"):
        ec.load(folder, toy.shaken(toy.Toy(joint=True).eval(), seed=5))


def test_truncated_tensors(folder, base):
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ec.CheckpointError, match="is damaged"):
        ec.load(folder, base)


def test_truncated_index(folder, base):
    path = folder / INDEX
    path.write_text(path.read_text()[:200])
    with pytest.raises(ec.CheckpointError, match="cannot be read"):
        ec.load(folder, base)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"version": 99, "package_version": "7.0"}, r"made by version 7\.0 of edit_compile, this is version .*; convert the model again"),
        ({"version": 1, "package_version": "0.0.9"}, r"made by version 0\.0\.9 of edit_compile"),
        ({"tensors": "../other.safetensors"}, "a path outside the folder"),
        ({"tensors": "/etc/passwd"}, "a path outside the folder"),
        ({"tensors": ".."}, "a path outside the folder"),
        ({"tensors": "sub/other.safetensors"}, "a path outside the folder"),
        ({"fingerprint": {"x": 1}}, r"fingerprint\.x"),
        ({"unshared": ["nothing.*"]}, r"'nothing\.\*' matches no weight"),
        ({"tensors": "gone.safetensors"}, "gone.safetensors is missing"),
        ({"surprise": 1}, "surprise: Extra inputs"),
        ({"plan": {}}, "not a plan"),
    ],
)
def test_a_bad_index_says_what_is_wrong(folder, base, entries, message):
    change(folder, **entries)
    with pytest.raises(ec.CheckpointError, match=message):
        ec.load(folder, base)


@pytest.mark.parametrize(("lose", "message"), [(True, "lacks blocks"), (False, r"has unknown blocks\.9\.extra")])
def test_missing_and_extra_keys(base, folder, lose, message):
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    if lose:
        tensors.popitem()
    else:
        tensors["blocks.9.extra"] = torch.zeros(1)
    save_file(tensors, path)
    change(folder, sha256=sha256(path))
    with pytest.raises(ec.CheckpointError, match=message):
        ec.load(folder, base)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensor: tensor * float("nan"), r"nothing was loaded: the weight blocks\.0\.attn\S+ holds NaN"),
        (lambda tensor: tensor.int(), r"has other numbers than floating-point for blocks\.0\.attn"),
        (lambda tensor: tensor[None], r"has wrong shapes for blocks\.0\.attn"),
    ],
    ids=["NaN", "integers", "shape"],
)
def test_weights_that_the_model_cannot_have_are_refused(base, folder, damage, message):
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = min(tensors)
    save_file(tensors | {name: damage(tensors[name])}, path)
    change(folder, sha256=sha256(path))
    with pytest.raises(ec.CheckpointError, match=message):
        ec.load(folder, base)


def test_a_link_is_followed_and_its_target_must_be_the_right_file(student, base, folder, tmp_path):
    """The hub's cache is a folder of links; a link to anything else has another hash."""
    (path,) = folder.glob("*.safetensors")
    target = path.rename(tmp_path / "blob")
    path.symlink_to(target)
    assert torch.equal(call(ec.load(folder, base)), call(student))
    target.write_bytes(b"something else")
    with pytest.raises(ec.CheckpointError, match="is damaged"):
        ec.load(folder, base)
    ec.save(student, folder)
    assert target.read_bytes() == b"something else"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_corrupt_index_is_an_error_or_harmless(folder, base, data):
    path = folder / INDEX
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = min(len(whole), start + data.draw(st.integers(0, 40)))
    path.write_bytes(whole[:start] + data.draw(st.binary(max_size=5)) + whole[stop:])
    try:
        with contextlib.suppress(ec.EditCompileError):
            ec.load(folder, base)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sizes: sizes[::-1], "in its own example, not"),
        (lambda sizes: [f"{size}*0+{10**30}" for size in sizes], "in its own example, not"),
        (lambda sizes: [f"{size}//0" for size in sizes], "does not follow from its own example"),
        (lambda sizes: ["-" * 401 + size for size in sizes], "in its own example, not"),
    ],
    ids=["exchanged", "huge", "by zero", "deep"],
)
def test_a_grid_that_is_not_the_plans_own_is_refused(folder, base, change, message):
    index = json.loads((folder / INDEX).read_text())
    grid = index["plan"]["grid"]
    grid["expressions"] = change(grid["expressions"])
    for site in index["plan"]["sites"]:
        if site["grid"] is not None:
            site["grid"]["sizes"] = change(site["grid"]["sizes"])
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ec.CheckpointError, match=message):
        ec.load(folder, base)


@pytest.mark.parametrize("inputs", [{"tensor": [-1, 2], "dtype": "float32"}, {"tensor": [10**30], "dtype": "float32"}])
def test_example_inputs_that_none_can_have_are_refused(folder, base, inputs):
    index = json.loads((folder / INDEX).read_text())
    index["plan"]["inputs"] = {"dict": {"x": inputs}}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ec.CheckpointError, match="not a description of example inputs"):
        ec.load(folder, base)


@pytest.mark.parametrize("name", [INDEX, "tensors"])
def test_what_may_have_no_end_is_not_read(folder, base, name):
    path = folder / (name if name == INDEX else json.loads((folder / INDEX).read_text())["tensors"])
    path.unlink()
    path.symlink_to("/dev/zero") if name == INDEX else os.mkfifo(path)
    with pytest.raises(ec.CheckpointError, match="is not a regular file"):
        ec.load(folder, base)


def test_two_who_save_at_once_leave_a_whole_checkpoint(student, base, folder):
    others = [copy.deepcopy(student) for _ in range(3)]
    for number, other in enumerate(others):
        toy.shaken(nn.ModuleList(converted_sites(other).values()), seed=number)
    outputs = [call(other) for other in others]
    with ThreadPoolExecutor(len(others)) as pool:
        for _ in range(3):
            list(pool.map(lambda other: ec.save(other, folder), others))
            assert any(torch.equal(call(ec.load(folder, base)), output) for output in outputs)
    assert len(list(folder.iterdir())) == 2


def test_no_checkpoint(tmp_path):
    with pytest.raises(ec.CheckpointError, match=r"holds no checkpoint: edit_compile\.json is missing"):
        ec.load(tmp_path)


def test_no_base(folder):
    with pytest.raises(ec.CheckpointError, match="does not say where its base model is"):
        ec.load(folder)


def test_a_base_that_only_the_checkpoint_names_is_not_downloaded(student, tmp_path, monkeypatch):
    ec.save(student, tmp_path / "saved", base="someone/model")
    downloads = []

    def ask(*args, **options):
        downloads.append(not constants.HF_HUB_OFFLINE)
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_access, "hub_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", ask)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", ask)
    said = r"was made from someone/model, which was not downloaded before, .*: pass base='someone/model', or download it yourself"
    for load in (ec.load, ec.load_pipeline):
        with pytest.raises(ec.CheckpointError, match=said):
            load(tmp_path / "saved")
        assert downloads
        assert not any(downloads)
        downloads.clear()
        with pytest.raises(ec.CheckpointError):
            load(tmp_path / "saved", "someone/model")
        assert any(downloads)
        downloads.clear()
    assert not constants.HF_HUB_OFFLINE
