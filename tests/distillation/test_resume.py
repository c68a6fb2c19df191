"""A run that is stopped, killed, or out of disk, and what continues from it."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from bitsandbytes.optim import AdamW8bit
from click.testing import CliRunner
from safetensors.torch import load_file

import edit_compile as ec
import toy_distill
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.cli import main
from edit_compile.distillation import distill
from edit_compile.distillation.data.prefetch import prefetch
from edit_compile.distillation.output.plot import plot_losses
from edit_compile.distillation.output.run_folder import RunFolder
from edit_compile.distillation.train import checkpoints
from edit_compile.distillation.train.checkpoints import _checksum, list_checkpoints
from edit_compile.distillation.train.optimizer import Optimizers
from edit_compile.distillation.train.spike_guard import SpikeGuard
from edit_compile.distillation.train.train_state import TrainState
from edit_compile.files import claimed
from edit_compile.tensor_files import SavedTensors, entries_of, write_tensors

WARM, STAGE, BATCH = 5, 6, 2
TIMES = ("seconds_per_step", "samples_per_second")


class DataSource(toy_distill.ToySource):
    """Calls `at` when the batch of a position is asked for."""

    def __init__(self, at=None):
        super().__init__()
        self.at = at or (lambda position: None)

    def batch(self, request):
        if request.split == "train":
            self.at(request.position)
        return super().batch(request)


def run(folder, at=None, resume=False, change=None, overwrite=False, **options):
    phases = {
        "stages": [{"resolution": [12, 16], "steps": STAGE, "global_batch_size": BATCH}],
        "layerwise": {"steps": WARM, "global_batch_size": BATCH},
        "validation": {"samples": 2, "batch_size": 2, "timestep_bins": 1},
    }
    source = DataSource(at)
    source.concurrent = False
    recipe = toy_distill.recipe(**phases | {"save_every": 2, "log_every": 1} | options)
    flow, student = NoiseSchedule("rectified-flow"), toy_distill.student()
    common = {"student": student, "source": source, "denoise": toy_distill.denoise, "schedule": flow}
    return distill(recipe, folder, resume=resume, overwrite=overwrite, **common)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return run(folder).student.state_dict(), rows(folder)


def rows(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in found]


def same(result, straight):
    return all(torch.equal(value, straight[0][name]) for name, value in result.student.state_dict().items())


def send(number, step):
    def at(position):
        if position == step * BATCH:
            os.kill(os.getpid(), number)

    return at


@pytest.mark.parametrize("step", [0, 2, WARM - 1, WARM, WARM + STAGE - 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_rest_is_the_same_bit_for_bit(tmp_path, straight, number, step):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ec.Interrupted, match=rf"stopped at .*, step {step % WARM + 1} of"):
        run(tmp_path, send(number, step))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert not (tmp_path / "result.json").exists()
    result = run(tmp_path, resume=True)
    assert same(result, straight)
    assert rows(tmp_path) == straight[1]


def test_a_sigkill_at_any_time_costs_nothing(tmp_path):
    script = Path(__file__).parent / "killed_run.py"
    paths = os.pathsep.join([str(Path(ec.__file__).parents[1]), str(script.parents[1])])
    found = subprocess.run(
        [sys.executable, script, tmp_path, "0"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False
    )
    assert found.returncode == 0, found.stderr
    outcome = json.loads(found.stdout.splitlines()[-1])
    assert outcome["kills"] >= 3
    assert outcome["in_save"] >= 1
    assert outcome["equal"]


def fails(at_step):
    def at(position):
        if position == at_step * BATCH:
            raise ec.DistillError("no more data")

    return at


def unfinished(folder, at_step=9, **options):
    with pytest.raises(ec.DistillError, match="no more data"):
        run(folder, fails(at_step), **options)
    return folder


def test_the_optimizer_in_8_bits_goes_on_bit_for_bit(tmp_path, monkeypatch):
    class Small(AdamW8bit):
        def __init__(self, *args, **options):
            super().__init__(*args, min_8bit_size=256, **options)  # by default tensors as small as the toy's stay in 32 bits

    monkeypatch.setattr("bitsandbytes.optim.AdamW8bit", Small)
    options = {"optimizer": {"kind": "adamw-8bit"}}
    whole = run(tmp_path / "whole", **options)
    state = load_file(list_checkpoints(unfinished(tmp_path / "stopped", **options) / "checkpoints")[-1] / "state.safetensors")
    assert torch.uint8 in {value.dtype for name, value in state.items() if name.startswith("optimizer:")}
    again = run(tmp_path / "stopped", resume=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.student.parameters(), again.student.parameters(), strict=True))
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")


def test_what_is_restored_goes_to_its_parameters_device(tmp_path):
    """Fused AdamW counts its steps on the device; a checkpoint has been on the CPU."""
    before, after = (torch.nn.Linear(3, 2, device=device) for device in ("cpu", "meta"))
    saved, restored = (TrainState(dict(m.named_parameters()), Optimizers(torch.optim.AdamW(m.parameters())), None) for m in (before, after))
    before(torch.ones(1, 3)).sum().backward()
    saved.step(1e-3)
    write_tensors(tmp_path / "state", entries_of(saved.tensors(), is_first=True))
    restored.load(SavedTensors([tmp_path / "state"]), saved.numbers())
    for parameter in after.parameters():
        assert {value.device.type for value in restored.optimizer.optimizers[0].state[parameter].values()} == {"meta"}


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, straight, monkeypatch):
    later, written = threading.Event(), []

    def write(path, entries):
        written.append(later.wait(20))
        return write_tensors(path, entries)

    monkeypatch.setattr(checkpoints, "write_tensors", write)
    at = fails(7)
    with pytest.raises(ec.DistillError, match="no more data"):
        run(tmp_path, lambda position: later.set() if position == 3 * BATCH else at(position), save_in_background=True)
    assert all(written)
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == "00000006"
    assert same(run(tmp_path, resume=True, save_in_background=True), straight)


def test_a_checkpoint_that_cannot_be_written_in_the_background_ends_the_run(tmp_path, monkeypatch):
    def write(path, entries):
        if "00000004" in str(path):
            raise OSError("no space left")
        return write_tensors(path, entries)

    monkeypatch.setattr(checkpoints, "write_tensors", write)
    with pytest.raises(ec.DistillError, match=r"00000004 cannot be written: no space left; the last good checkpoint is .*00000002"):
        run(tmp_path, save_in_background=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000002"]


def test_checkpoints_are_rotated(tmp_path):
    unfinished(tmp_path, keep_last=3)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["00000004", "00000006", "00000008"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00000004", "00000006", "00000008"]


def test_a_finished_run_leaves_no_checkpoints(tmp_path):
    run(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(ec.DistillError, match="has a finished run: there is nothing to resume"):
        run(tmp_path, resume=True)
    with pytest.raises(ec.DistillError, match="has a finished run: replace it with --overwrite"):
        run(tmp_path)
    run(tmp_path, overwrite=True)
    with pytest.raises(ec.DistillError, match="resume continues the run in the folder, overwrite begins another"):
        run(tmp_path, resume=True, overwrite=True)


@pytest.mark.parametrize("damage", ["tensors", "json", "numbers"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, straight, damage, caplog):
    newest = list_checkpoints(unfinished(tmp_path) / "checkpoints")[-1]
    if damage == "tensors":
        path = newest / "state.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    elif damage == "json":
        (newest / "state.json").write_text("{")
    else:
        content = json.loads((newest / "state.json").read_text())
        (newest / "state.json").write_text(json.dumps(content | {"before": {"total": 0.1}}))
    result = run(tmp_path, resume=True)
    assert f"checkpoint {newest} cannot be used" in caplog.text
    assert same(result, straight)


def test_a_damaged_checkpoint_is_not_kept_in_the_place_of_a_good_one(tmp_path):
    """Resumed from the one before, fewer are kept and later ones are saved: those that are good."""
    newest = list_checkpoints(unfinished(tmp_path, keep_last=3) / "checkpoints")[-1]
    (newest / "state.safetensors").write_bytes(b"damaged")
    with pytest.raises(ec.DistillError, match="no more data"):
        run(tmp_path, fails(7), resume=True, keep_last=1, save_every=1)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["00000007"]


def test_all_damaged_is_an_error(tmp_path):
    for path in list_checkpoints(unfinished(tmp_path) / "checkpoints"):
        (path / "state.json").write_text("")
    with pytest.raises(ec.DistillError, match=r"no checkpoint in .* can be used"):
        run(tmp_path, resume=True)


def rewrite(checkpoint, **changes):
    file = checkpoint / "state.json"
    content = {name: value for name, value in {**json.loads(file.read_text()), **changes}.items() if value is not None}
    file.write_text(json.dumps(content | {"checksum": _checksum(content)}))


@pytest.mark.parametrize(("maker", "named"), [("0.0.9", "0.0.9"), (None, "before 0.1.0")])
def test_checkpoints_of_another_version_name_it(tmp_path, maker, named):
    for path in list_checkpoints(unfinished(tmp_path) / "checkpoints"):
        rewrite(path, version=1, package_version=maker)
    with pytest.raises(ec.DistillError, match=f"00000008: it was made by version {named} of edit_compile, this is version"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize("reason", ["version", "disk"])
def test_a_checkpoint_that_may_be_sound_is_neither_passed_over_nor_removed(tmp_path, straight, reason, monkeypatch):
    newest = list_checkpoints(unfinished(tmp_path) / "checkpoints")[-1]
    if reason == "version":
        rewrite(newest, version=99, package_version="9.0")
        message = rf"{newest}: it was made by version 9\.0 .*; continue with that version, or choose another folder"
    else:
        real = checkpoints.sha256

        def sha256(path):
            if path.parent == newest:
                raise OSError(5, "Input/output error")
            return real(path)

        monkeypatch.setattr(checkpoints, "sha256", sha256)
        message = rf"{newest}: it cannot be read: .*Input/output error; once it can be"
    with pytest.raises(ec.DistillError, match=message):
        run(tmp_path, resume=True)
    assert newest in list_checkpoints(tmp_path / "checkpoints")
    monkeypatch.undo()
    if reason == "disk":
        assert same(run(tmp_path, resume=True), straight)


def test_copies_of_checkpoints_are_neither_counted_nor_removed(tmp_path):
    newest = list_checkpoints(unfinished(tmp_path) / "checkpoints")[-1]
    copies = [newest.with_name(name) for name in ("00000004-good", "1", "00000008.bak")]
    for copied in copies:
        shutil.copytree(newest, copied)
    with pytest.raises(ec.DistillError, match="no more data"):
        run(tmp_path, fails(9), resume=True, keep_last=1, save_every=1)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["00000009"]
    assert all((copied / "state.json").is_file() for copied in copies)


def test_a_run_whose_recipe_this_version_cannot_read_names_its_version(tmp_path):
    newest = list_checkpoints(unfinished(tmp_path) / "checkpoints")[-1]
    recipe = json.loads((newest / "state.json").read_text())["recipe"]
    rewrite(newest, package_version="9.0.0", recipe=recipe | {"sharpness": 1})
    with pytest.raises(ec.DistillError, match=r"was made by version 9\.0\.0 of edit_compile, .* cannot read its recipe: sharpness"):
        run(tmp_path, resume=True)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, straight):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(position):
        if position == 5 * BATCH:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))

    try:
        with pytest.raises(ec.DistillError, match=r"cannot be written: .*; the last good checkpoint is .*00000004"):
            run(tmp_path, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000002", "00000004"]
    assert same(run(tmp_path, resume=True), straight)


def test_forwards_may_be_smaller_when_a_run_goes_on(tmp_path, straight):
    unfinished(tmp_path)
    stage = {"resolution": [12, 16], "steps": STAGE, "global_batch_size": BATCH, "micro_batch_size": 1}
    result = run(tmp_path, resume=True, stages=[stage])
    for name, value in result.student.state_dict().items():
        torch.testing.assert_close(value, straight[0][name], atol=1e-5, rtol=1e-3)


def test_another_run_is_not_overwritten(tmp_path):
    unfinished(tmp_path)
    with pytest.raises(ec.DistillError, match="has an unfinished run: continue it with --resume"):
        run(tmp_path)
    with pytest.raises(ec.DistillError, match=r"another recipe: seed \(0 then, 1 now\)"):
        run(tmp_path, resume=True, seed=1)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ec.DistillError, match="is a file"):
        run(file)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["recipe.yaml", "result.json", "edit_compile.json"], r"has a finished run: replace it with --overwrite \(overwrite=\)"),
        (["edit_compile.json"], "holds a converted model: replace it"),
        (["notes.txt", ".hidden"], r"is not empty \(notes.txt\): replace it"),
        (["recipe.yaml"], r"is not empty \(recipe.yaml\): replace it"),  # its author's, perhaps
        (["recipe.yaml", "metrics.jsonl", "notes.txt"], r"is not empty \(metrics.jsonl, notes.txt, recipe.yaml\): replace it"),
    ],
)
def test_what_a_folder_holds_is_replaced_only_if_that_is_asked_for(tmp_path, files, message):
    (folder := tmp_path / "run").mkdir()
    for name in files:
        (folder / name).write_text("{}")
    with pytest.raises(ec.DistillError, match=message):
        RunFolder(folder).check(resume=False, overwrite=False)
    RunFolder(folder).check(resume=False, overwrite=True)
    (folder / "samples").mkdir()
    RunFolder(folder).open(toy_distill.recipe(), resume=False, writes=True)
    foreign = {"notes.txt", ".hidden"} & set(files)
    assert {path.name for path in folder.iterdir()} == {"recipe.yaml", "metrics.jsonl", *foreign}


def test_a_recipe_beside_its_authors_own_files_stays(tmp_path, monkeypatch):
    """`distill recipe.yaml -o .`"""
    monkeypatch.chdir(tmp_path)
    recipe = toy_distill.recipe(model="demo/dit")
    Path("recipe.yaml").write_text(f"# mine\n{yaml.safe_dump(recipe.model_dump(mode='json'))}")
    (tmp_path / "samples").mkdir()
    before = {path: path.read_text() if path.is_file() else None for path in tmp_path.rglob("*")}
    result = CliRunner().invoke(main, ["distill", "recipe.yaml", "-o", "."])
    assert result.exit_code == 1
    assert "is not empty (recipe.yaml, samples): replace it with --overwrite" in result.stderr
    assert {path: path.read_text() if path.is_file() else None for path in tmp_path.rglob("*")} == before


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    with claimed(tmp_path / "run" / ".lock"), pytest.raises(ec.DistillError, match=r"another process distils into .*run, or did"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_row_of_metrics_costs_that_row_only(tmp_path):
    folder = RunFolder(tmp_path)
    rows = ['{"total": 1}', "junk", '{"total": 2}', "[]", '{"total": "3"}', '{"total": 9}']
    folder.metrics.write_text("".join(f"{row}\n" for row in rows))
    folder._prepare(toy_distill.recipe(), 3)
    assert [row["total"] for row in folder.rows()] == [1, 2]


def test_whatever_stands_in_the_metrics_they_can_be_read_and_plotted(tmp_path):
    folder = RunFolder(tmp_path)
    sound = [{"phase": "stage 1", "total": 1, "loss": 0.5}, {"total": 2, "loss": 0.25}]
    junk = [b"\xff\xfe", b"\0" * 50, b"[" * 100_000, b'{"total": 3, "loss": "x"}', b'{"total": 3, "loss": NaN}', b'{"total": true}']
    junk += [b'{"total": 3, "phase": 1}', b'{"total": 3, "loss": null}', b'{"total": -1}', b"9" * 5000]
    folder.metrics.write_bytes(b"\n".join([*junk, *(json.dumps(row).encode() for row in sound), b'{"total": 2, "lo']))
    assert folder.rows() == sound
    folder._prepare(toy_distill.recipe(), 2)
    assert folder.rows() == sound
    plot_losses(folder.rows(), toy_distill.recipe(), (1.0, 0.5), tmp_path / "losses.png")


def test_what_changes_no_result_may_change_on_resuming(tmp_path, straight):
    unfinished(tmp_path)
    assert same(run(tmp_path, resume=True, keep_last=1, save_every=100, log_every=3), straight)


def test_resuming_nothing_is_beginning(tmp_path, straight):
    assert same(run(tmp_path, resume=True), straight)


class Broken(toy_distill.ToySource):
    """Some positions give no number."""

    def __init__(self, positions):
        super().__init__()
        self.positions = positions

    def batch(self, request):
        batch = super().batch(request)
        if request.split == "train" and request.position in self.positions:
            batch.latents[:] = math.nan
        return batch


@pytest.mark.parametrize("layerwise", [None, {"steps": 6, "global_batch_size": 1}])
def test_steps_without_a_number_are_left_out(tmp_path, layerwise):
    stage = {"resolution": [12, 16], "steps": 6, "global_batch_size": 1}
    recipe = toy_distill.recipe(stages=[stage], layerwise=layerwise, max_skipped_steps=2)
    model = toy_distill.student()
    common = {"denoise": toy_distill.denoise, "schedule": NoiseSchedule("rectified-flow")}
    distill(recipe, tmp_path, student=model, source=Broken({1, 2, 5}), **common)
    assert all(p.isfinite().all() for p in model.parameters())
    assert [row["skipped"] for row in rows(tmp_path)][:6] == [0, 1, 1, 0, 0, 1]


def test_too_many_in_a_row_stop_the_run_and_name_the_last_checkpoint(tmp_path):
    stage = {"resolution": [12, 16], "steps": 12, "global_batch_size": 1}
    recipe = toy_distill.recipe(stages=[stage], layerwise=None, max_skipped_steps=2, save_every=4)
    common = {"denoise": toy_distill.denoise, "schedule": NoiseSchedule("rectified-flow")}
    with pytest.raises(
        ec.DistillError,
        match=r"stage 0, step 8: its loss is nan; .*the previous 2 steps were skipped too.*last good checkpoint is .*00000004",
    ):
        distill(recipe, tmp_path, student=toy_distill.student(), source=Broken(set(range(5, 12))), **common)


def test_an_exploding_loss_is_left_out():
    guard = SpikeGuard()
    for _ in range(30):
        guard, reason = guard.after(1.0, 1.0, 10)
        assert reason is None
    guard, reason = guard.after(11.0, 1.0, 10)
    assert reason == "its loss 11 is more than 10 times the recent 1"
    assert guard.consecutive_skips == 1
    assert guard.loss_ema == pytest.approx(1)
    guard, reason = guard.after(9.0, 1.0, 10)
    assert reason is None
    assert guard.consecutive_skips == 0
    assert guard.after(1.0, math.inf, 10)[1] == "its gradient's norm is inf"


def test_prefetching_keeps_order_and_errors():
    assert list(prefetch(lambda x: x * x, range(20))) == [x * x for x in range(20)]

    def draw(x):
        if x == 3:
            raise ValueError("three")
        return x

    found = prefetch(draw, range(10))
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(found)
