"""Two processes do what one does; and what makes a step smaller or faster changes nothing about it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import two_processes

import edit_compile as ec
import toy_distill
from edit_compile.distillation.train.distributed import make_accelerator

pytestmark = pytest.mark.slow

LOSSES = ("loss", "task", "output", "feature", "grad_norm")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folders of a run in one process, and of four in two processes."""
    folder = tmp_path_factory.mktemp("runs")
    script = Path(two_processes.__file__)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    paths = os.pathsep.join([str(Path(ec.__file__).parents[1]), str(script.parents[1])])
    processes = []
    for rank in ("0", "1"):
        environment = {**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        arguments = [sys.executable, script, folder]
        processes.append(subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    two_processes.run(folder / "one")
    for kind, trained in two_processes.TRAINED.items():
        two_processes.run(folder / f"one_{kind}", trained=trained)
    outputs = [process.communicate(timeout=250)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "kept_whole", "resumed"])
def test_losses_are_those_of_one_process(folder, kind):
    one, two = rows(folder / "one"), rows(folder / kind)
    assert [row["total"] for row in one] == [row["total"] for row in two] == list(range(1, 21))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in LOSSES:
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=2e-4), (a["phase"], a["step"], name)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "kept_whole", "resumed", "fsdp_lora", "fsdp_blocks"])
def test_the_student_and_its_error_are_those_of_one_process(folder, kind):
    alone = kind.replace("fsdp_", "one_") if kind.startswith("fsdp_") else "one"
    one, two = (ec.load(folder / name, toy_distill.base()).state_dict() for name in (alone, kind))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-4)
    errors = [json.loads((folder / name / "result.json").read_text())["held_out_error"] for name in (alone, kind)]
    for when in ("before", "after"):
        assert errors[1][when]["total"] == pytest.approx(errors[0][when]["total"], rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "version2", "optimizer", "message"),
    [
        ("XLA", False, "adamw", "XLA is not supported: launch with DDP or with FSDP version 2"),
        ("FSDP", False, "adamw", "FSDP version 1 is not supported: launch with --fsdp_version 2"),
        ("FSDP", True, "adamw-8bit", "adamw-8bit does not support FSDP"),
        ("FSDP", True, "muon", "muon does not support FSDP"),
    ],
)
def test_what_cannot_be_distributed_is_refused_before_anything_is_trained(monkeypatch, tmp_path, kind, version2, optimizer, message):
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value=kind), is_fsdp2=version2, num_processes=2, mixed_precision="no")
    monkeypatch.setattr("accelerate.Accelerator", lambda **options: accelerator)
    with pytest.raises(ec.DistillError, match=message):
        make_accelerator(toy_distill.recipe(optimizer={"kind": optimizer}), tmp_path)


def test_resuming_shards_is_bit_for_bit(folder):
    one, two = (ec.load(folder / name, toy_distill.base()).state_dict() for name in ("fsdp", "resumed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
