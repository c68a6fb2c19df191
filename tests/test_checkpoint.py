"""Checkpoints: the difference to the base, whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

import edit_compile as ec
import toy
from edit_compile.checkpoint import MANIFEST, fingerprint, load, load_pipeline, save
from edit_compile.errors import CheckpointError
from edit_compile.sites import converted_sites
from families import FAMILIES
from pipelines import pixart_pipeline


def trained(student: nn.Module, seed: int = 0) -> nn.Module:
    toy.shaken(nn.ModuleList(converted_sites(student).values()), seed)
    return student


def same_state(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def site_names(student: nn.Module) -> set[str]:
    return {name for name in student.state_dict() if any(name.startswith(f"{path}.") for path in converted_sites(student))}


def tensor_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("edit_compile-*.safetensors"))


def edit_manifest(folder: Path, **changes) -> None:
    content = json.loads((folder / MANIFEST).read_text()) | changes
    (folder / MANIFEST).write_text(json.dumps(content))


def rewrite_tensors(folder: Path, tensors: dict[str, torch.Tensor], names: list[str] | None = None) -> None:
    """Other tensors, under a hash that is right."""
    import hashlib

    data = safetensors.torch.save(tensors)
    (file,) = tensor_files(folder)
    file.write_bytes(data)
    stated = {"name": file.name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(folder, file=stated, **({} if names is None else {"tensors": names}))


@pytest.fixture(scope="module")
def base():
    return toy.shaken(toy.Toy().eval())


@pytest.fixture(scope="module")
def plan(base):
    return ec.plan(base, example_inputs=toy.inputs())


@pytest.fixture(scope="module")
def student(base, plan):
    return trained(ec.linearize(base, plan=plan))


@pytest.fixture(scope="module")
def other(student):
    return trained(copy.deepcopy(student), seed=5)


@pytest.fixture
def folder(student, tmp_path):
    save(student, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("name", ["pixart", "sd3-dual"])
def test_round_trip_is_bit_for_bit(name, tmp_path):
    model, inputs = FAMILIES[name]()
    student = trained(ec.linearize(model, example_inputs=inputs))
    save(student, tmp_path)
    again = load(tmp_path, base=model)
    assert type(again) is type(model)
    assert same_state(again, student)
    assert ec.plan_of(again) == ec.plan_of(student)
    with torch.no_grad():
        assert torch.equal(student(**inputs)[0], again(**inputs)[0])
        with ec.teacher(again):
            assert torch.equal(model(**inputs)[0], again(**inputs)[0])
    assert {n: p.requires_grad for n, p in again.named_parameters()} == {n: p.requires_grad for n, p in student.named_parameters()}


def test_only_the_sites_are_inside(student, folder):
    (file,) = tensor_files(folder)
    assert set(safetensors.torch.load_file(file)) == site_names(student) < set(student.state_dict())
    content = json.loads((folder / MANIFEST).read_text())
    assert content["version"] == 1
    assert content["model"] == "Toy"
    assert content["base"] is None
    assert content["file"]["name"] == file.name
    assert ec.Plan.from_json(json.dumps(content["plan"])) == ec.plan_of(student)


def test_trained_tensors_outside_the_sites_travel_and_leave_the_base_alone(base, student, tmp_path):
    student = copy.deepcopy(student)
    student.out.weight = nn.Parameter(student.out.weight.detach() + 1)
    vars(student.edit_runtime)["trained"] = {"out.weight"}
    save(student, tmp_path)
    before = base.out.weight.clone()
    again = load(tmp_path, base=base)
    assert same_state(again, student)
    assert torch.equal(base.out.weight, before)
    save(again, tmp_path)  # what was trained is known again
    assert same_state(load(tmp_path, base=base), student)


def test_loading_takes_the_dtype_of_the_base(base, student, folder):
    again = load(folder, base=copy.deepcopy(base).to(torch.bfloat16))
    assert same_state(again, copy.deepcopy(student).to(torch.bfloat16))


def test_a_bfloat16_student_loads_on_a_float32_base(base, student, tmp_path):
    small = copy.deepcopy(student).to(torch.bfloat16)
    save(small, tmp_path)
    again = load(tmp_path, base=base)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert same_state(again.to(torch.bfloat16), small)


def test_fingerprint_is_the_bases(base, student):
    expected = fingerprint(base)
    assert fingerprint(student) == expected
    assert fingerprint(trained(copy.deepcopy(student), seed=9)) == expected
    assert fingerprint(copy.deepcopy(base).to(torch.bfloat16)) == expected
    assert fingerprint(copy.deepcopy(student).to(torch.bfloat16)) == expected
    assert fingerprint(toy.shaken(copy.deepcopy(base), amount=0.1)) != expected
    assert fingerprint(toy.Toy(blocks=3)) != expected
    on_meta = fingerprint(copy.deepcopy(base).to("meta"))
    assert on_meta == expected.split("-")[0] + "-structure"


def test_the_base_is_found_by_the_name_it_was_saved_with(base, student, folder, tmp_path, monkeypatch):
    asked = []

    def load_model(name):
        asked.append(name)
        return SimpleNamespace(model=base)

    monkeypatch.setitem(sys.modules, "edit_compile.adapters.models", SimpleNamespace(load_model=load_model))
    save(student, folder, base="someone/toy")
    again = load(folder)
    save(again, folder)  # it remembers
    load(folder)
    again = load(folder, base=tmp_path)
    assert asked == ["someone/toy", "someone/toy", str(tmp_path)]
    assert vars(again)["edit_base"] == str(tmp_path)


def test_a_base_that_cannot_be_found_is_named(folder, student, monkeypatch):
    def load_model(name):
        raise ec.ModelNotFoundError(f"no model {name}\nsecond line")

    monkeypatch.setitem(sys.modules, "edit_compile.adapters.models", SimpleNamespace(load_model=load_model))
    with pytest.raises(CheckpointError, match=r"base nobody/none cannot be loaded; give base=: no model nobody/none$"):
        load(folder, base="nobody/none")
    with pytest.raises(CheckpointError, match="does not say which Toy it was made from: give base="):
        load(folder)


def test_saving_again_replaces_and_leaves_other_files(base, student, other, folder):
    (folder / "transformer").mkdir()
    (folder / "model_index.json").write_text("{}")
    (folder / "edit_compile-0123456789ab.safetensors").write_bytes(b"of a save that was killed")
    save(other, folder)
    assert same_state(load(folder, base=base), other)
    assert len(tensor_files(folder)) == 1
    kept = {path.name for path in folder.iterdir()} - {tensor_files(folder)[0].name}
    assert kept == {MANIFEST, "transformer", "model_index.json"}
    save(other, folder)
    assert same_state(load(folder, base=base), other)


class Killed(BaseException):
    pass


STEPS = ["save_file", "fsync", "replace", "unlink"]


def kill_at(monkeypatch, name: str, call: int) -> None:
    owner = {"save_file": safetensors.torch, "unlink": Path}.get(name, os)
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize("name", STEPS)
def test_a_save_killed_at_any_point_leaves_the_old_or_the_new(name, base, student, other, tmp_path, monkeypatch):
    found, sizes = [], {"save_file": 1, "fsync": 4, "replace": 2, "unlink": 1}
    for call in range(1, sizes[name] + 2):
        folder = tmp_path / str(call)
        save(student, folder)
        with monkeypatch.context() as patched:
            kill_at(patched, name, call)
            try:
                save(other, folder)
                found.append("finished")
            except Killed:
                found.append("killed")
        again = load(folder, base=base)
        assert same_state(again, student) or same_state(again, other)
        save(other, folder)
        assert len(tensor_files(folder)) == 1
        assert not list(folder.glob("*.tmp"))
    assert found == ["killed"] * sizes[name] + ["finished"]


SAVE_AND_DIE = """
import os, signal, sys
import torch, toy
import edit_compile as ec
from edit_compile.checkpoint import save
real, calls = os.replace, []
def replace(*args):
    calls.append(args)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*args)
os.replace = replace
base = toy.shaken(toy.Toy().eval())
save(toy.shaken(ec.linearize(base, example_inputs=toy.inputs())), sys.argv[1])
"""


def test_a_killed_process_leaves_the_old_checkpoint(base, student, other, folder):
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SAVE_AND_DIE, str(folder)], env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert len(tensor_files(folder)) == 2
    assert (folder / f"{MANIFEST}.tmp").exists()
    assert same_state(load(folder, base=base), student)
    save(other, folder)
    assert {path.name for path in folder.iterdir()} == {MANIFEST, tensor_files(folder)[0].name}


def truncate_tensors(folder):
    (file,) = tensor_files(folder)
    os.truncate(file, file.stat().st_size // 2)


def flip_a_byte(folder):
    (file,) = tensor_files(folder)
    file.write_bytes(file.read_bytes()[:-1] + b"\x77")


def truncate_manifest(folder):
    os.truncate(folder / MANIFEST, 200)


def name_outside(folder):
    content = json.loads((folder / MANIFEST).read_text())["file"]
    edit_manifest(folder, file=content | {"name": f"../{content['name']}"})


def change_plan(folder):
    plan = json.loads((folder / MANIFEST).read_text())["plan"]
    edit_manifest(folder, plan=plan | {"surprise": 1})


def change_tensors(change):
    def changed(folder):
        (file,) = tensor_files(folder)
        tensors = safetensors.torch.load_file(file)
        change(tensors)
        rewrite_tensors(folder, tensors)

    return changed


NAME = "blocks.0.attn.to_q.weight"
DAMAGE = {
    "nothing there": (lambda f: [p.unlink() for p in f.iterdir()], "is no checkpoint: it has no edit_compile.json"),
    "truncated tensors": (truncate_tensors, r"has \d+ bytes where \d+ were saved; copy it again"),
    "other bytes": (flip_a_byte, "its SHA-256 differs"),
    "tensors missing": (lambda f: tensor_files(f)[0].unlink(), r"edit_compile-\w+.safetensors is missing; copy the whole folder"),
    "truncated manifest": (truncate_manifest, "edit_compile.json is damaged"),
    "no object": (lambda f: (f / MANIFEST).write_text("[1]"), "edit_compile.json is damaged"),
    "not text": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe{"), "edit_compile.json is damaged"),
    "later version": (lambda f: edit_manifest(f, version=2), "has version 2, this release reads version 1"),
    "unknown key": (lambda f: edit_manifest(f, surprise=1), r"is damaged \(surprise: Extra inputs"),
    "path outside": (name_outside, r"names '\.\./edit_compile-\w+.safetensors', no tensor file in its own folder"),
    "other plan": (change_plan, "holds no plan that this release can use: not a plan: surprise"),
    "key missing": (change_tensors(lambda t: t.pop(NAME)), rf"\(missing: {NAME}\); save it again"),
    "key added": (change_tensors(lambda t: t.update({"blocks.0.attn.more": torch.zeros(1)})), r"\(unexpected: blocks.0.attn.more\)"),
    "other shape": (change_tensors(lambda t: t.update({NAME: torch.zeros(2)})), rf"\(of another shape or kind: {NAME}\)"),
    "all missing": (change_tensors(dict.clear), r"\(missing: [\w.]+, [\w.]+, [\w.]+ and \d+ more\)"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told_in_one_line(name, base, folder):
    damage, message = DAMAGE[name]
    damage(folder)
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder, base=base)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())


def test_names_outside_the_model_are_refused(base, folder):
    (file,) = tensor_files(folder)
    tensors = safetensors.torch.load_file(file) | {"no.such.place": torch.zeros(1)}
    rewrite_tensors(folder, tensors, sorted(tensors))
    with pytest.raises(CheckpointError, match=r"\(unexpected: no.such.place\)"):
        load(folder, base=base)


def test_a_wrong_base_is_named_with_the_right_one(base, student, folder):
    save(student, folder, base="someone/toy")
    mine = fingerprint(base)
    for wrong in (toy.shaken(copy.deepcopy(base)), toy.Toy(blocks=3), nn.Linear(2, 2)):
        with pytest.raises(CheckpointError, match=f"was made from Toy someone/toy .*{mine}.* another {type(wrong).__name__}") as caught:
            load(folder, base=wrong)
        assert fingerprint(wrong) in str(caught.value)
    with pytest.raises(CheckpointError, match="the base Toy is converted already; give the original"):
        load(folder, base=student)
    with pytest.raises(CheckpointError, match="base is of no use: int is neither"):
        load(folder, base=3)


def test_float16_rounds_otherwise_and_the_message_says_so(base, folder):
    with pytest.raises(CheckpointError, match="load it in float32 or bfloat16"):
        load(folder, base=copy.deepcopy(base).to(torch.float16))


def test_what_cannot_be_saved(base, student, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file; a checkpoint is a folder"):
        save(student, tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        save(student, tmp_path / "file" / "below")
    with pytest.raises(CheckpointError, match="Toy is not converted"):
        save(base, tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"have no values \(meta device\)"):
        save(copy.deepcopy(student).to("meta"), tmp_path / "new")
    adapted = copy.deepcopy(student)
    adapted.blocks[0].attn.to_q.lora = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"blocks.0.attn was changed .*to_q.lora.bias, to_q.lora.weight"):
        save(adapted, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def pipeline():
    return pixart_pipeline()


@pytest.fixture(scope="module")
def converted(pipeline):
    return ec.linearize(pipeline)


def test_a_pipeline_from_a_folder_or_an_object(pipeline, converted, tmp_path):
    pipeline.save_pretrained(tmp_path / "base")
    trained(converted.transformer)
    save(converted.transformer, tmp_path / "base", base=tmp_path / "base")  # beside the pipeline
    again = load_pipeline(tmp_path / "base", torch_dtype=torch.float32)
    original = pipeline.transformer
    shared = load_pipeline(tmp_path / "base", base=pipeline)
    for loaded in (again, shared):
        assert type(loaded) is type(pipeline)
        assert same_state(loaded.transformer, converted.transformer)
    assert pipeline.transformer is original
    assert not converted_sites(pipeline.transformer)
    assert shared.vae is pipeline.vae
    with pytest.raises(CheckpointError, match="no pipeline can be loaded from"):
        load_pipeline(tmp_path / "base", base=tmp_path)
    with pytest.raises(CheckpointError, match="base is a Linear; give a diffusers pipeline"):
        load_pipeline(tmp_path / "base", base=nn.Linear(2, 2))


def test_a_pipeline_needs_a_name(student, folder):
    with pytest.raises(CheckpointError, match="does not say which pipeline"):
        load_pipeline(folder)
