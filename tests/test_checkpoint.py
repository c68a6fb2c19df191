"""Checkpoints: exact, small, strict, and never half-written."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn

import edit_compile as ec
import toy
from edit_compile import checkpoint
from edit_compile.sites import converted_sites
from pipelines import pixart_pipeline


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
    path = folder / checkpoint.INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_round_trip_is_bit_for_bit(student, base, folder):
    loaded = ec.load(folder, base)
    assert torch.equal(call(loaded), call(student))
    assert ec.plan_of(loaded) == ec.plan_of(student)
    with ec.teacher(loaded):
        assert torch.equal(call(loaded), call(base))


def test_it_holds_only_what_was_added_or_trained(student, folder):
    names = checkpoint.trained_tensors(student)
    assert all(".attn." in name for name in names)
    assert sorted(p.name.split("-")[0] for p in folder.iterdir()) == ["edit_compile", "edit_compile.json"]
    size = sum(t.numel() * t.element_size() for t in names.values())
    assert sum(p.stat().st_size for p in folder.glob("*.safetensors")) < size + 10_000


def test_fingerprint_is_the_bases(base, student):
    expected = checkpoint.fingerprint(base)
    assert checkpoint.fingerprint(student) == expected
    assert checkpoint.fingerprint(toy.Toy(joint=True)) != expected


def test_saving_again_replaces_and_cleans_up(student, base, folder):
    toy.shaken(nn.ModuleList(converted_sites(student).values()), seed=8)
    ec.save(student, folder)
    assert len(list(folder.iterdir())) == 2
    assert torch.equal(call(ec.load(folder, base)), call(student))


@pytest.mark.parametrize("function", ["replace", "fsync"])
@pytest.mark.parametrize("call_number", [1, 2])
def test_a_save_that_dies_leaves_the_previous_checkpoint(student, base, folder, monkeypatch, function, call_number):
    expected = call(student)
    toy.shaken(nn.ModuleList(converted_sites(student).values()), seed=9)
    real, calls = getattr(os, function), []

    def dies(*args):
        calls.append(args)
        if len(calls) == call_number:
            raise OSError("no space left on device")
        return real(*args)

    monkeypatch.setattr(os, function, dies)
    with pytest.raises(OSError, match="no space"):
        ec.save(student, folder)
    monkeypatch.undo()
    assert torch.equal(call(ec.load(folder, base)), expected)


def test_wrong_base(folder):
    with pytest.raises(ec.CheckpointError, match="made from another base"):
        ec.load(folder, toy.shaken(toy.Toy(joint=True).eval(), seed=5))


def test_truncated_tensors(folder, base):
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ec.CheckpointError, match="is damaged"):
        ec.load(folder, base)


def test_truncated_index(folder, base):
    path = folder / checkpoint.INDEX
    path.write_text(path.read_text()[:200])
    with pytest.raises(ec.CheckpointError, match="cannot be read"):
        ec.load(folder, base)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"version": 99}, "version 99, this release reads version 1"),
        ({"tensors": "../other.safetensors"}, "a path outside the folder"),
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
def test_missing_and_extra_keys(student, base, tmp_path, monkeypatch, lose, message):
    tensors = checkpoint.trained_tensors(student)
    if lose:
        tensors.popitem()
    else:
        tensors["blocks.9.extra"] = torch.zeros(1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "trained_tensors", lambda _: tensors)
        ec.save(student, tmp_path)
    with pytest.raises(ec.CheckpointError, match=message):
        ec.load(tmp_path, base)


def test_no_checkpoint(tmp_path):
    with pytest.raises(ec.CheckpointError, match=r"holds no checkpoint: edit_compile\.json is missing"):
        ec.load(tmp_path)


def test_no_base(folder):
    with pytest.raises(ec.CheckpointError, match="does not say where its base model is"):
        ec.load(folder)


def test_pipeline_round_trip(tmp_path):
    pipe = pixart_pipeline()
    pipe.save_pretrained(tmp_path / "base")
    student = ec.linearize(pipe)
    ec.save(student.transformer, tmp_path / "student", base=str(tmp_path / "base"))
    loaded = ec.load_pipeline(tmp_path / "student")
    assert type(loaded) is type(pipe)
    expected, got = student.transformer.state_dict(), loaded.transformer.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
