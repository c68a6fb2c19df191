"""What a finished run shows: sample grids, plot, model card, trackers, upload."""

from __future__ import annotations

import json
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import edit_compile as ec
import toy_distill
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.cli import main
from edit_compile.distillation import distill
from edit_compile.distillation import run as runner
from edit_compile.distillation.console import line_of, show_progress
from edit_compile.distillation.output import hub
from edit_compile.distillation.recipe import load as recipe_file
from edit_compile.distillation.train.trackers import chosen_trackers

OPTIONS = {
    "stages": [{"resolution": [12, 16], "steps": 4, "global_batch_size": 2}, {"resolution": [16, 16], "steps": 2, "global_batch_size": 2}],
    "samples": {"every": 3, "count": 2, "steps": 3},
    "trackers": None,
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    common = {"denoise": toy_distill.denoise, "schedule": NoiseSchedule("rectified-flow"), "source": toy_distill.ToySource()}
    return distill(toy_distill.recipe(**OPTIONS), folder, student=toy_distill.student(), **common)


def test_images_are_sampled_on_the_way_and_at_the_end(result):
    names = sorted(path.name for path in (result.folder / "samples").iterdir())
    assert names == [f"{total:08d}.png" for total in (3, 6, 9, 12)]
    first, last = (np.asarray(Image.open(result.folder / "samples" / name)) for name in (names[0], names[-1]))
    assert first.shape == last.shape
    assert first.std() > 10
    assert (first != last).any()


def test_drawing_changes_nothing_about_the_run(result, tmp_path):
    common = {"denoise": toy_distill.denoise, "schedule": NoiseSchedule("rectified-flow"), "source": toy_distill.ToySource()}
    options = {**OPTIONS, "samples": {"every": None, "count": 2, "steps": 3}}
    other = distill(toy_distill.recipe(**options), tmp_path, student=toy_distill.student(), **common)
    assert all(torch.equal(a, b) for a, b in zip(result.student.parameters(), other.student.parameters(), strict=True))


def test_the_card_says_what_was_done(result):
    _, front, text = (result.folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "edit_compile"
    for part in (
        "2 of 2 attention sites",
        f"{result.after.total:.4f}",
        f"{result.before.bins[1].error:.4f}",
        "12 x 16 px",
        "16 x 16 px",
    ):
        assert part in text
    assert "![losses](losses.png)" in text
    assert "![00000012](samples/00000012.png)" in text
    assert "blocks.{0..1}.attn" in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["samples"]["every"] == 3


def test_the_losses_are_plotted(result):
    assert np.asarray(Image.open(result.folder / "losses.png")).std() > 10


def test_speed_is_measured_at_every_stage(result):
    assert [(s.height, s.width) for s in result.speeds] == [(12, 16), (16, 16)]
    assert all(s.teacher > 0 and s.student > 0 for s in result.speeds)
    assert len(json.loads((result.folder / "result.json").read_text())["speeds"]) == 2


@pytest.mark.parametrize("prediction", ["rectified-flow", "epsilon", "v-prediction"])
def test_split_undoes_mixing(prediction):
    alphas = torch.linspace(0.999, 0.01, 1000) if prediction != "rectified-flow" else None
    schedule, generator = NoiseSchedule(prediction, alphas), torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, 4, 3, 5, 5, generator=generator)
    times = torch.tensor([1.0, 300.0, 700.0, 990.0])
    x, target = schedule.add_noise(image, noise, times)
    for found, expected in zip(schedule.predict_x0_and_noise(x, target, times), (image, noise), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_rows_are_lines_or_nothing(result, capsys):
    row = json.loads((result.folder / "metrics.jsonl").read_text().splitlines()[-1])
    with show_progress(toy_distill.recipe(), quiet=False) as report:
        report(row)
    assert capsys.readouterr().err.strip() == line_of(row)
    with show_progress(toy_distill.recipe(), quiet=True) as report:
        report(row)
    assert capsys.readouterr().err == ""
    assert "1 skipped" in line_of({**row, "skipped": 1})


def test_tensorboard_has_the_recipe_and_every_number(result):
    (folder,) = (result.folder / "trackers").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "feature/blocks.0.attn", "lr", "skipped"):
        logged = {event.step: event.value for event in events.Scalars(name)}
        assert logged == pytest.approx({row["total"]: row[name] for row in rows if name in row})
    (settings,) = folder.glob("*/hparams.yml")
    assert yaml.safe_load(settings.read_text())["stages.1.steps"] == 2


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ec.DistillError, match="wandb is not installed: pip install wandb"):
        chosen_trackers(("wandb",))


class Api:
    """The part of the hub's client that is used, with a hub that remembers or refuses."""

    calls: ClassVar[list] = []
    error: ClassVar[Exception | None] = None

    def create_repo(self, name, **options):
        if self.error:
            raise self.error
        return f"https://hub/{name}"

    def upload_folder(self, **options):
        self.calls.append(options)


class Unseen(toy_distill.ToySource):
    """Latents that nothing can decode in the memory there is."""

    def decode(self, latents):
        raise torch.OutOfMemoryError("out of memory\nmore")


def test_an_image_that_fails_does_not_cost_the_student(tmp_path, caplog, monkeypatch):
    def fail(context):
        raise RuntimeError("no time")

    monkeypatch.setattr(runner, "measure_speeds", fail)
    common = {"denoise": toy_distill.denoise, "schedule": NoiseSchedule("rectified-flow"), "source": Unseen()}
    result = distill(toy_distill.recipe(**OPTIONS | {"trackers": []}), tmp_path, student=toy_distill.student(), **common)
    assert result.speeds == ()
    assert "the sample grid is left out: out of memory" in caplog.text
    assert "the speed is left out: no time" in caplog.text
    assert (tmp_path / "result.json").exists()
    assert not (tmp_path / "samples").exists()
    ec.load(tmp_path, toy_distill.base())


def test_what_would_end_a_later_stage_ends_the_run_at_once(tmp_path):
    class Small(toy_distill.ToySource):
        def check(self, height, width):
            if height > 12:
                raise ec.DistillError(f"no images of {height} pixels")

    common = {"denoise": toy_distill.denoise, "schedule": NoiseSchedule("rectified-flow"), "source": Small()}
    with pytest.raises(ec.DistillError, match=r"^stage 1: no images of 16 pixels"):
        distill(toy_distill.recipe(**OPTIONS), tmp_path, student=toy_distill.student(), **common)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_uploading(result, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert hub.push_to_hub(result.folder, "me/student") == "https://hub/me/student"
    assert Api.calls[-1]["folder_path"] == result.folder
    monkeypatch.setattr(Api, "error", OSError("no network\nmore"))
    with pytest.raises(ec.DistillError, match=r"me/student cannot be uploaded: no network; run `hf auth login`; the student is in"):
        hub.push_to_hub(result.folder, "me/student")


def test_an_interrupted_command_says_how_to_continue_and_is_no_success(monkeypatch, tmp_path):
    def stops(*args, **kwargs):
        raise ec.Interrupted("stopped at stage 0, step 3 of 9; saved in x")

    monkeypatch.setattr(runner, "distill", stops)
    found = CliRunner().invoke(main, ["distill", "demo-mm-dit", "--set", "seed=1", "-o", str(tmp_path / "a b")])
    assert found.exit_code == 130
    command = f"edit-compile distill demo-mm-dit --set seed=1 -o '{tmp_path / 'a b'}' --resume"
    assert found.stderr == f"stopped at stage 0, step 3 of 9; saved in x. To continue: {command}\n"
    assert recipe_file.load_recipe("demo-mm-dit", ["seed=1"]).seed == 1
