"""What a finished run shows: sample grids, plot, model card, trackers, upload."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import edit_compile as ec
import toy_distill
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.cli import main
from edit_compile.distillation import distill
from edit_compile.distillation import run as runner
from edit_compile.distillation.console import print_result
from edit_compile.distillation.output import hub
from edit_compile.distillation.output import model_card as cards
from edit_compile.distillation.output.html_report import write_report
from edit_compile.distillation.output.plot import plot_losses
from edit_compile.distillation.recipe import load as recipe_file
from edit_compile.distillation.train.trackers import chosen_trackers

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
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
    first, second, _, last = (np.asarray(Image.open(result.folder / "samples" / name)) for name in names)
    assert first.shape == last.shape
    assert first.std() > 10
    headings = [grid[:46] for grid in (first, second, last)]
    assert (headings[0] == headings[1]).all()
    assert (headings[0] != headings[2]).any()  # the last one has the error
    assert (first != last)[46:].any()


def test_drawing_changes_nothing_about_the_run(result, tmp_path):
    common = {"denoise": toy_distill.denoise, "schedule": NoiseSchedule("rectified-flow"), "source": toy_distill.ToySource()}
    options = {**OPTIONS, "samples": {"every": None, "count": 2, "steps": 3}}
    other = distill(toy_distill.recipe(**options), tmp_path, student=toy_distill.student(), **common)
    assert all(torch.equal(a, b) for a, b in zip(result.student.parameters(), other.student.parameters(), strict=True))


def test_the_card_says_what_was_done(result):
    _, front, text = (result.folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "edit_compile"
    for part in (
        "# Toy, distilled to mm-edit\n",
        "2 of 2 attention sites",
        f"{result.after.total:.3g}",
        f"{result.before.bins[1].error:.3g}",
        "12 x 16 px",
        "16 x 16 px",
    ):
        assert part in text
    assert "![losses](losses.png)" in text
    assert "![00000012](samples/00000012.png)" in text
    assert "blocks.{0..1}.attn" in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["samples"]["every"] == 3


def test_the_card_names_the_bases_licence_and_no_path_of_this_machine(result, monkeypatch, tmp_path):
    of_base = {"license": "other", "license_name": "community", "pipeline_tag": "text-to-image"}
    monkeypatch.setattr(cards, "card_of", lambda name: of_base)
    recipe = toy_distill.recipe(**OPTIONS, model=str(tmp_path / "secret" / "model"))
    plan, both = ec.plan_of(result.student), (result.before, result.after)
    card = ModelCard(cards.model_card(recipe, plan, "someone/base", *both, result.speeds, ()))
    assert (card.data.base_model, card.data.base_model_relation) == ("someone/base", "finetune")
    assert {name: card.data.to_dict()[name] for name in of_base} == of_base
    (found,) = card.data.eval_results
    assert found.metric_value == pytest.approx(result.after.total, rel=1e-2)
    assert 'edit_compile.load_pipeline("this folder", base="someone/base")' in card.text
    assert "secret" not in str(card)
    assert str(tmp_path) not in cards.model_card(recipe, plan, str(tmp_path), *both, result.speeds, ())


@pytest.mark.parametrize(
    ("base", "on_hub", "code"),
    [
        ("timm/vit_tiny", None, 'edit_compile.load("this folder", base="timm/vit_tiny")'),
        ("timm/vit_tiny.augreg", "timm/vit_tiny.augreg", 'edit_compile.load("this folder", base="timm/vit_tiny.augreg")'),
        ("someone/base@v1", "someone/base", 'edit_compile.load_pipeline("this folder", base="someone/base@v1")'),
        ("demo/dit", None, 'edit_compile.sample("this folder", '),
        (None, None, 'edit_compile.load("this folder")'),
    ],
)
def test_the_card_names_the_base_as_the_hub_and_the_code_do(result, monkeypatch, base, on_hub, code):
    monkeypatch.setattr(cards, "card_of", lambda name: {})
    card = ModelCard(
        cards.model_card(toy_distill.recipe(**OPTIONS), ec.plan_of(result.student), base, result.before, result.after, result.speeds, ())
    )
    assert card.data.base_model == on_hub
    assert code in card.text


def test_the_card_has_the_flops_and_where_they_pay(result):
    costs = ec.cost("demo/dit", [(32, 32), (128, 128)])
    recipe, plan = toy_distill.recipe(**OPTIONS), ec.plan_of(result.student)
    text = cards.model_card(recipe, plan, "demo/dit", result.before, result.after, result.speeds, (), costs)
    assert f"It needs fewer from {costs.break_even_tokens:,} image tokens on." in text
    assert f"| {costs.costs[1].ratio:.2f}x |" in text
    assert "## FLOPs" not in (result.folder / "README.md").read_text()  # nobody knows the toy's inputs


def test_the_losses_are_plotted(result):
    assert np.asarray(Image.open(result.folder / "losses.png")).std() > 10


def test_the_report_is_one_page_that_needs_nothing_else(result):
    page = (result.folder / "report.html").read_text()
    parsed = Page(page)
    assert [kind for kind in parsed.sources if not kind.startswith("data:image/png;base64,")] == []
    assert len(parsed.sources) == 4 + 2  # sample grids; losses and speeds
    assert not {"script", "link", "iframe"} & set(parsed.tags)
    assert parsed.headings == ["Images", "Losses", "Validation error", "Speed", "Made with", "What was done to the model", "Recipe"]
    for part in (f"{result.before.total:.3g}", f"{result.after.total:.3g}", "blocks.{0..1}.attn", "12 x 16 px", "global_batch_size: 2"):
        assert part in parsed.text
    assert str(result.folder) not in page
    assert Page(result._repr_html_()).headings == parsed.headings[:5]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_shows_the_report(result, tmp_path):
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]
    options = [f"--user-data-dir={tmp_path}/profile", f"--screenshot={tmp_path}/page.png", "--window-size=900,3000"]
    subprocess.run([CHROMIUM, *quiet, *options, (result.folder / "report.html").as_uri()], check=True, capture_output=True, timeout=120)
    page = np.asarray(Image.open(tmp_path / "page.png").convert("L"), dtype=float)
    assert page.shape == (3000, 900)
    assert (page[:600].std(axis=1) > 1).mean() > 0.3  # text and the sample grid
    assert (page.std(axis=1) > 1).sum() > 1000


class Page(HTMLParser):
    """The tags of a page, where its images are, its second headings and its text. All that is opened must be closed in order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.sources, self.headings, self.text, self.open = [], [], [], "", []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)


def test_the_report_says_what_the_data_were(result, tmp_path):
    folder = shutil.copytree(result.folder, tmp_path / "run")
    found = json.loads((folder / "result.json").read_text())
    data = {"found": 1200, "held_out": 24, "skipped": 0, "shapes": {"512x768": 1176}}
    (folder / "result.json").write_text(json.dumps(found | {"data": data}))
    text = Page(write_report(folder).read_text()).text
    assert "found1,200held out24skipped0trained on at 512 x 768 px1,176" in text


def test_a_report_of_many_grids_has_the_last_and_some(result, tmp_path):
    folder = shutil.copytree(result.folder, tmp_path / "run")
    for total in range(13, 30):
        shutil.copy(folder / "samples" / "00000012.png", folder / "samples" / f"{total:08d}.png")
    page = Page(write_report(folder).read_text())
    assert re.findall(r"after (\d+) steps", page.text) == ["29", "26", "23", "20", "17", "14", "9"]


def test_a_folder_is_no_markup(result, capsys):
    print_result(dataclasses.replace(result, folder=Path("runs/[lr=0.1]:x:")), as_json=False)
    assert capsys.readouterr().out.endswith("the student is in runs/[lr=0.1]:x:\n")


def test_the_command_makes_the_report_again(result, tmp_path):
    found = CliRunner().invoke(main, ["report", str(result.folder), "-o", str(tmp_path / "page.html")])
    assert found.output == f"written to {tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").read_text() == (result.folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "holds no finished run: result.json is missing"),
        ("{", "result.json cannot be read .*: damaged, or of another version"),
        ('{"held_out_error": {}}', "result.json cannot be read .*KeyError.*: damaged, or of another version"),
    ],
)
def test_a_report_is_of_a_finished_run(tmp_path, content, said):
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(ec.DistillError, match=said):
        write_report(tmp_path)


def test_losses_are_plotted_weighted_and_smoothed(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda self, x, y, *style, **options: lines.append((options.get("label"), x, y)))
    rows = [{"phase": "stage 0", "total": step, "loss": 3.0, "output": 2.0, "task": 1.0} for step in (10, 20, 30)]
    stage = {"resolution": [12, 16], "steps": 30, "global_batch_size": 2, "losses": {"output": 1.25, "task": 0.5, "feature": 0}}
    plot_losses(rows, toy_distill.recipe(stages=[stage], layerwise=None), (0.4, 0.1), tmp_path / "losses.png")
    smoothed = {label: (x, y) for label, x, y in lines if label is not None}
    assert smoothed.keys() == {"loss", "output", "task", "validation error"}
    assert smoothed["output"] == ((10, 20, 30), pytest.approx((2.5, 2.5, 2.5)))
    assert smoothed["task"] == ((10, 20, 30), pytest.approx((0.5, 0.5, 0.5)))
    assert smoothed["validation error"] == ((0, 30), (0.4, 0.1))


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

    def auth_check(self, name, *, write=False):
        if (name, write) == ("others/student", True):
            raise OSError("403: no write access")

    def create_commit(self, repository, operations, commit_message):
        contents = {each.path_in_repo: each.path_or_fileobj for each in operations}
        self.calls.append((repository, {name: c if isinstance(c, bytes) else Path(c).read_bytes() for name, c in contents.items()}))


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
    assert "## Speed" not in (tmp_path / "README.md").read_text()
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


def test_uploading(result, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    folder = shutil.copytree(result.folder, tmp_path / "secret" / "run")
    for name in ("result.json", "recipe.yaml", "edit_compile.json"):
        content = yaml.safe_load((folder / name).read_text())
        place = {"result.json": ("folder",), "recipe.yaml": ("data", "path"), "edit_compile.json": ("base",)}[name]
        (content["data"] if len(place) == 2 else content)[place[-1]] = str(tmp_path / "secret" / "model")
        (folder / name).write_text(json.dumps(content))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "one").write_text("large")
    for name in ("unreadable.json", "data.json"):  # which name the files that were trained on
        (folder / name).write_text(json.dumps({f"{tmp_path}/secret/a.png": f"cannot identify image file '{tmp_path}/secret/a.png'"}))
    write_report(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for repository in ("me/student", "others-may-read/student"):
        assert hub.push_to_hub(folder, repository) == f"https://hub/{repository}"
        found, contents = Api.calls[-1]
        assert found == repository
        assert f'edit_compile.load("{repository}")' in contents["README.md"].decode()
        assert "|student - teacher|²" in contents["README.md"].decode()
        assert not any(b"secret" in content for content in contents.values())
        assert json.loads(contents["edit_compile.json"])["base"] == "model"
        assert {"losses.png", "report.html", "samples/00000012.png", "metrics.jsonl"} <= contents.keys()
        assert not any(name.startswith("checkpoints") for name in contents)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ec.DistillError, match=r"others/student cannot be made or written: 403: no write access"):
        hub.make_repository("others/student")
    monkeypatch.setattr(Api, "error", OSError("no network\nmore"))
    with pytest.raises(ec.DistillError, match=r"me/student cannot be made or written: no network; run `hf auth login`"):
        hub.push_to_hub(result.folder, "me/student")
    monkeypatch.setattr(runner, "distill", lambda *args, **kwargs: pytest.fail("trained before the hub was asked"))
    found = CliRunner().invoke(main, ["distill", "demo-mm-dit", "--push-to-hub", "me/student"])
    assert (found.exit_code, found.stderr.count("\n")) == (1, 1)
    monkeypatch.setattr(Api, "error", None)
    monkeypatch.setattr(Api, "create_commit", lambda self, *args, **options: json.loads("{"))
    with pytest.raises(ec.DistillError, match=r"me/student cannot be uploaded: .*; the student is in"):
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
    found = CliRunner().invoke(main, ["--import", "json", "distill", "demo-mm-dit", "--overwrite"])
    assert found.stderr.endswith("To continue: edit-compile --import json distill demo-mm-dit --resume\n")
    monkeypatch.setattr(runner, "distill", interrupted)
    found = CliRunner().invoke(main, ["distill", "demo-mm-dit"])
    assert (found.exit_code, found.stderr) == (130, "stopped. To continue: edit-compile distill demo-mm-dit --resume\n")
    monkeypatch.setattr("edit_compile.distillation.recipe.load.load_recipe", interrupted)
    found = CliRunner().invoke(main, ["cache", "demo-mm-dit", "-o", "cache"])
    assert (found.exit_code, found.stderr) == (130, "stopped\n")
    monkeypatch.setattr("edit_compile.distillation.recipe.load.load_recipe", full)
    found = CliRunner().invoke(main, ["cache", "demo-mm-dit", "-o", "cache"])
    assert (found.exit_code, found.stderr) == (1, "error: [Errno 28] No space left on device: 'shard'\n")
    monkeypatch.undo()
    monkeypatch.setattr("edit_compile.distillation.ranking.rank.rank", stops)
    found = CliRunner().invoke(main, ["rank", "demo/dit", "--candidates", "edit, mix-ffn", "--time", "--set", "seed=1"])
    assert found.exit_code == 130
    assert found.stderr.endswith("To continue: edit-compile rank demo/dit --candidates 'edit, mix-ffn' --time --set seed=1\n")


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device", "shard")
