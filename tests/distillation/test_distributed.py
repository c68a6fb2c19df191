"""Two processes do what one does; and what makes a step smaller or faster changes nothing about it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import two_processes
from safetensors.torch import load_file

import data_files
import edit_compile as ec
import toy_distill
from edit_compile.distillation.train import distributed
from edit_compile.distillation.train.checkpoints import list_checkpoints, load_newest
from edit_compile.distillation.train.distributed import make_accelerator
from edit_compile.distillation.train.peers import LOST

pytestmark = pytest.mark.slow

LOSSES = ("loss", "task", "output", "feature", "grad_norm")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def two_running(folder, what):
    """Run `two_processes.py` in two processes; yields them."""
    script = Path(two_processes.__file__)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    paths = os.pathsep.join([str(Path(ec.__file__).parents[1]), str(script.parents[1])])
    processes = []
    for rank in ("0", "1"):
        environment = {**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        arguments = [sys.executable, script, folder, what]
        processes.append(subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def both(processes):
    """Wait until two processes have done what they should."""
    outputs = [process.communicate(timeout=250)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folders of a run in one process, and of four in two processes."""
    folder = tmp_path_factory.mktemp("runs")
    with two_running(folder, "runs") as processes:
        two_processes.run(folder / "one")
        for kind, trained in two_processes.TRAINED.items():
            two_processes.run(folder / f"one_{kind}", trained=trained)
        both(processes)
    return folder


def test_state_goes_from_two_processes_to_one_and_back_bit_for_bit(tmp_path):
    with two_running(tmp_path, "state") as processes:
        both(processes)
    before, (two,) = load_file(tmp_path / "before.safetensors"), list_checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in sorted(two.iterdir())] == [
        "state-00000-of-00002.safetensors",
        "state-00001-of-00002.safetensors",
        "state.json",
    ]
    state = two_processes.restored(tmp_path / "checkpoints")
    assert state.tensors().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in state.tensors().items())
    two_processes.save_state(state, tmp_path / "checkpoints", 2).finish()
    with two_running(tmp_path, "state") as processes:
        both(processes)
    after = load_file(tmp_path / "after.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_dead_or_stopped_ends_the_other(tmp_path, number, lost):
    with two_running(tmp_path, "meet") as processes:
        wait_until_ready(tmp_path)
        processes[lost].send_signal(number)
        left = processes[1 - lost]
        output = left.communicate(timeout=60)[0]
    assert left.returncode == LOST == 75, output
    (line,) = (line for line in output.splitlines() if line.startswith("error:"))
    assert re.fullmatch(
        rf"error: process {lost} on \S+ gave its last sign of life \d+ s ago: it is dead or hangs; "
        "the last good checkpoint is 00000007",
        line,
    )


def test_a_process_that_fails_ends_the_other_with_its_reason(tmp_path):
    with two_running(tmp_path, "meet") as processes:
        wait_until_ready(tmp_path)
        (tmp_path / "fail").touch()
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert re.search(r"^error: process 1 on \S+ ended: no more data; the last good checkpoint is 00000007$", outputs[0], re.MULTILINE)


def test_a_process_whose_main_thread_alone_hangs_ends_both(tmp_path):
    with two_running(tmp_path, "meet") as processes:
        wait_until_ready(tmp_path)
        (tmp_path / "hang").touch()
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [LOST, LOST], outputs
    (line,) = (line for output in outputs for line in output.splitlines() if line.startswith("error:"))
    assert re.fullmatch(
        r"error: process 1 on \S+ stands still at \S+two_processes.py:\d+ \(meet\) while others wait for it: it hangs; "
        "the last good checkpoint is 00000007",
        line,
    )


def test_a_process_may_take_its_time_while_the_other_waits(tmp_path):
    with two_running(tmp_path, "meet") as processes:
        wait_until_ready(tmp_path)
        for name in two_processes.LONG:
            (tmp_path / name).touch()
        for name in two_processes.LONG:
            wait_until_exists(tmp_path / f"{name}.done", 100)
        assert [process.poll() for process in processes] == [None, None]


def wait_until_exists(path, seconds):
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.1)


def wait_until_ready(folder):
    while not all((folder / f"{rank}.ready").exists() for rank in (0, 1)):
        time.sleep(0.1)


def test_a_stream_is_shared_out_and_continued_where_it_was(tmp_path):
    folders = {"one": tmp_path / "one", "two": tmp_path / "two"}
    for folder in folders.values():
        images = data_files.folder_of(folder / "images", [(12, 16)] * 100, captions=False)
        lines = [data_files.as_json(file_name=f"{i:03d}.png", text=f"image {i}").decode() for i in range(100)]
        (images / "metadata.jsonl").write_text("\n".join(lines))
    with two_running(folders["two"], "stream") as processes:
        two_processes.run_stream(folders["one"])
        both(processes)
    ((_, alone),) = (json.loads((folders["one"] / "0.json").read_text()),)
    parts = [json.loads((folders["two"] / f"{rank}.json").read_text()) for rank in (0, 1)]
    first, rest = ({**a["trained"], **b["trained"]} for a, b in zip(*parts, strict=True))
    assert len(rest) == 32 - 20
    assert rest == {position: alone["trained"][position] for position in rest}
    for own, other in zip(*parts, strict=True):
        assert own["trained"].keys().isdisjoint(other["trained"])
        assert set(own["trained"].values()).isdisjoint(other["trained"].values())  # less than an epoch
    assert set(first.values()).isdisjoint(rest[position] for position in rest if position not in first)


@pytest.mark.parametrize("damaged", ["gone", "changed"])
def test_a_checkpoint_without_one_process_part_is_passed_over(tmp_path, caplog, damaged):
    state = two_processes.state_of(two_processes.uneven_model(seed=0))
    for total in (1, 2):
        two_processes.save_state(state, tmp_path, total).finish()
    file = list_checkpoints(tmp_path)[-1] / "state.safetensors"
    file.unlink() if damaged == "gone" else file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert load_newest(tmp_path)[0].total == 1
    assert "00000002 cannot be used" in caplog.text


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "kept_whole", "resumed"])
def test_losses_are_those_of_one_process(folder, kind):
    one, two = rows(folder / "one"), rows(folder / kind)
    assert [row["total"] for row in one] == [row["total"] for row in two] == list(range(1, 21))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in LOSSES:
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=2e-4), (a["phase"], a["step"], name)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "kept_whole", "resumed", "fsdp_lora", "fsdp_blocks", "fsdp_all"])
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


def test_processes_that_converted_a_model_differently_are_named(monkeypatch):
    monkeypatch.setattr(distributed, "gathered", lambda own: [*own, "another", *own])
    with pytest.raises(ec.DistillError, match=r"^process 1 converted the model in another way than process 0: convert it once"):
        distributed.share_sites(toy_distill.student(), None)


def test_resuming_shards_is_bit_for_bit(folder):
    one, two = (ec.load(folder / name, toy_distill.base()).state_dict() for name in ("fsdp", "resumed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
