"""Evaluation of a demo model: images that are made once, metrics by torchmetrics, and errors before anything is sampled."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

import edit_compile as ec
from edit_compile.cli import main
from edit_compile.demo import models as demo
from edit_compile.evaluation import metrics as module
from edit_compile.evaluation.clip import Clip
from edit_compile.evaluation.images import read, real_images
from edit_compile.evaluation.metrics import METRICS, FidClip, Metric, chosen_metrics
from edit_compile.files import claimed
from edit_compile.report import compare_samples
from pipelines import clip_tokenizer

PROMPTS = ["a red circle", "a green square", "a blue circle"]
STEPS = {"steps": 2, "guidance": 1.0}


class Difference(Metric):
    """Stands for a metric with a network: the mean absolute difference from the teacher's images, and brightness of the teacher's."""

    name = "difference"
    network = "none"
    resize = "none"
    against = "the teacher's images"
    seen: list = []  # noqa: RUF012

    def missing(self):
        return None

    def measure(self, images):
        pairs = list(zip(images.batches("teacher"), images.batches("student"), images.batches_of_prompts(), strict=True))
        self.seen += [(teacher.shape, prompts) for teacher, _, prompts in pairs]
        distance = torch.cat([(t.float() - s.float()).abs().mean((1, 2, 3)) for t, s, _ in pairs]).mean()
        found = {"student": float(distance)}
        return found | ({"teacher": float(len(list(images.batches("real"))))} if images.has_real else {})


class Absent(Difference):
    name = "absent"

    def missing(self):
        return "weights.pth to /nowhere"


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    monkeypatch.setattr(Difference, "seen", [])
    for kind in (Difference, Absent):
        monkeypatch.setitem(METRICS, kind.name, kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("converted")
    torch.manual_seed(0)
    ec.save(ec.linearize("demo/dit"), place, base="demo/dit")
    return place


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join([*PROMPTS, ""]))
    return file


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP model of random weights, as the hub has them."""
    place, tokenizer = tmp_path_factory.mktemp("clip"), clip_tokenizer()
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = layers | {"vocab_size": len(tokenizer)}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = layers | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text | ends, vision_config=vision, projection_dim=6)).save_pretrained(place)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def real(tmp_path):
    place = tmp_path / "real"
    (place / "more").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number, side in enumerate(((40, 60), (64, 32), (33, 32))):
        pixels = generator.integers(0, 255, (*side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / ("more" if number else ".") / f"{number}.png")
    (place / "notes.txt").touch()
    return place


def run(folder, output, prompts=PROMPTS, metrics=("difference",), **options):
    return ec.evaluate(folder, prompts, output=output, metrics=metrics, **STEPS | options)


def test_images_are_those_of_sample_and_the_json_says_how_they_were_made(folder, tmp_path):
    found = run(folder, tmp_path / "out.json", seed=5, batch_size=2)
    samples = ec.sample(folder, PROMPTS, seed=5, **STEPS)
    for who, expected in (("teacher", samples.teacher), ("student", samples.student)):
        for number, pixels in enumerate(expected):
            written = np.asarray(Image.open(tmp_path / "out" / who / f"{number:06d}.png"))
            np.testing.assert_array_equal(written, (pixels.clip(0, 1) * 255).round().astype(np.uint8))
    assert Difference.seen == [(torch.Size([2, 3, 32, 32]), PROMPTS[:2]), (torch.Size([1, 3, 32, 32]), PROMPTS[2:])]
    content = json.loads((tmp_path / "out.json").read_text())
    assert content == json.loads(json.dumps(found.to_dict()))
    assert (content["samples"], content["seeds"], content["height"], content["base"]) == (3, [5, 7], 32, "demo/dit")
    (metric,) = content["metrics"]
    assert metric["student"] > 1
    assert metric["teacher"] is None
    assert metric["libraries"].keys() == {"torchmetrics"}


def test_an_interrupted_evaluation_goes_on_and_makes_no_image_twice(folder, tmp_path, monkeypatch):
    whole = run(folder, tmp_path / "whole.json", batch_size=1)
    made, sample = [], demo.sample

    def counted(model, captions, **options):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(captions)
        return sample(model, captions, **options)

    monkeypatch.setattr(compare_samples.demo, "sample", counted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out.json", batch_size=1)
    assert not (tmp_path / "out.json").exists()
    made[:] = made[2:]  # two more may be made
    assert run(folder, tmp_path / "out.json", batch_size=1).metrics == whole.metrics
    monkeypatch.setattr(compare_samples.demo, "sample", None)
    assert run(folder, tmp_path / "out.json", batch_size=3).metrics == whole.metrics


def test_more_samples_than_prompts_repeat_them_with_other_noise(folder, tmp_path):
    run(folder, tmp_path / "out.json", prompts=PROMPTS[:1], samples=2)
    first, second = (np.asarray(Image.open(tmp_path / "out" / "teacher" / f"{n:06d}.png")) for n in range(2))
    assert not np.array_equal(first, second)
    assert [prompt for _, batch in Difference.seen for prompt in batch] == PROMPTS[:1] * 2


def test_a_damaged_image_is_named_and_made_again(folder, tmp_path):
    before = run(folder, tmp_path / "out.json")
    for damage in (b"damaged", (tmp_path / "out" / "student" / "000000.png").read_bytes()[:60]):
        (damaged := tmp_path / "out" / "teacher" / "000000.png").write_bytes(damage)
        with pytest.raises(ec.ConfigError, match=r"000000\.png cannot be read as an image: .*; remove it"):
            run(folder, tmp_path / "out.json")
    damaged.unlink()
    assert run(folder, tmp_path / "out.json") == before


def test_a_second_process_is_refused(folder, tmp_path):
    with claimed(tmp_path / "out" / ".lock"), pytest.raises(ec.ConfigError, match=r"another process evaluates into .*out"):
        run(folder, tmp_path / "out.json")
    assert not (tmp_path / "out").exists()


def test_metrics_share_one_clip_model(clip_folder):
    score, distance = chosen_metrics(["clip-score", "fid-clip"], str(clip_folder))
    assert score.load_clip() is distance.load_clip()


def test_images_made_in_another_way_are_not_mixed(folder, tmp_path):
    run(folder, tmp_path / "out.json", prompts=PROMPTS[:1])
    with pytest.raises(ec.ConfigError, match=r"out has images that were made otherwise: steps \(2 then, 3 now\); choose another file"):
        run(folder, tmp_path / "out.json", prompts=PROMPTS[:1], steps=3)
    with pytest.raises(ec.ConfigError, match="made otherwise: prompts"):
        run(folder, tmp_path / "out.json", prompts=PROMPTS)
    with pytest.raises(ec.ConfigError, match=r"made otherwise: base \('demo/dit' then, 'elsewhere' now\)"):
        run(folder, tmp_path / "out.json", prompts=PROMPTS[:1], base="elsewhere")


def test_clip_score_and_frechet_distances_are_torchmetrics_own(folder, tmp_path, clip_folder, real):
    options = {"metrics": ["clip-score", "fid-clip"], "clip_name": str(clip_folder), "batch_size": 2}
    alone = run(folder, tmp_path / "alone.json", **options)
    score, distance = alone.metrics
    network = Clip(str(clip_folder))
    sets = {who: torch.stack([read(tmp_path / "alone" / who / f"{n:06d}.png") for n in range(3)]) for who in ("teacher", "student")}
    for who, images in sets.items():
        tokens = network.tokenizer(PROMPTS, padding=True, return_tensors="pt")
        text = network.model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
        pixels = network.images(images=list(images), return_tensors="pt")["pixel_values"]
        seen = network.model.get_image_features(pixels).pooler_output
        expected = max(0.0, 100 * torch.cosine_similarity(text, seen).mean().item())
        assert getattr(score, who) == pytest.approx(expected, rel=1e-4)
    assert distance.teacher is None
    assert distance.against == "the teacher's images"
    assert distance.student == pytest.approx(frechet(network(sets["teacher"]), network(sets["student"])), rel=1e-3, abs=1e-4)
    with_real = run(folder, tmp_path / "alone.json", images=real, **options).metrics[1]
    size = network(torch.stack([read(file, (32, 32)) for file in real_images(real)]))
    assert with_real.against == "real images"
    for who, images in sets.items():
        assert getattr(with_real, who) == pytest.approx(frechet(size, network(images)), rel=1e-3, abs=1e-4)


def frechet(a, b):
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), arXiv 1706.08500, in float64."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(cov_a @ cov_b).sqrt().real.sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root).item()


def test_real_images_are_scaled_to_cover_and_cropped(real):
    files = real_images(real)
    assert len(files) == 3
    assert {tuple(read(file, (32, 48)).shape) for file in files} == {(3, 32, 48)}


def test_weights_that_are_not_at_hand_are_named_before_anything_is_sampled(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(ec.ConfigError) as caught:
        run(folder, tmp_path / "out.json", metrics=["fid-inception", "lpips", "difference"])
    message, cache = str(caught.value), tmp_path / "torch" / "hub" / "checkpoints"
    assert "\n" not in message
    assert f"for fid-inception fetch {module._INCEPTION} to {cache}/weights-inception-2015-12-05-6726825d.pth" in message
    assert f"for lpips fetch {module._ALEXNET} to {cache}/alexnet-owt-7be5be79.pth" in message
    with pytest.raises(ec.ConfigError, match=r"for absent fetch weights\.pth to /nowhere; or leave them out with --metrics"):
        run(folder, tmp_path / "out.json", metrics=["absent"])
    with pytest.raises(ec.ConfigError, match=r"for clip-score and fid-clip fetch no/clip into .* with `hf download no/clip`"):
        run(folder, tmp_path / "out.json", metrics=["clip-score", "fid-clip"], clip_name="no/clip")
    with pytest.raises(ec.ConfigError, match=r"fetch config\.json, preprocessor_config\.json, model\.safetensors of a CLIP model into"):
        chosen_metrics(["clip-score"], str(tmp_path))
    assert not (tmp_path / "out").exists()


def test_weights_at_hand_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    for name in ("weights-inception-2015-12-05-6726825d.pth", "alexnet-owt-7be5be79.pth"):
        (tmp_path / "hub" / "checkpoints" / name).touch()
    assert [metric.name for metric in chosen_metrics(["lpips", "fid-inception"], "")] == ["lpips", "fid-inception"]


def test_the_names_of_weights_are_those_that_the_libraries_load():
    import torchvision
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert torchvision.models.AlexNet_Weights.IMAGENET1K_V1.url == module._ALEXNET
    assert URL_INCEPTION_V3 == module._INCEPTION


@pytest.mark.parametrize("library", ["torchmetrics", "torch_fidelity"])
def test_a_library_that_is_not_installed_is_named(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ec.EditCompileError, match=rf"fid-inception needs {library}: pip install 'edit_compile\[eval\]'"):
        chosen_metrics(["fid-inception"], "")


def test_a_library_that_is_broken_says_how(tmp_path, monkeypatch):
    (tmp_path / "torch_fidelity.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_fidelity", raising=False)
    with pytest.raises(
        ec.EditCompileError, match=r"torch_fidelity, which cannot be imported \(operator torchvision::nms .*\): pip install"
    ):
        chosen_metrics(["fid-inception"], "")


def test_wrong_options_are_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(FidClip, "missing", lambda self: None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n")
    for reason, where, options in (
        ("--metrics fid: unknown metric; there are: clip-score, fid-inception, fid-clip, lpips", folder, {"metrics": ["fid"]}),
        ("fid-clip needs 2 samples or more, not 1", folder, {"samples": 1, "metrics": ["fid-clip"]}),
        ("has 0 images", folder, {"images": tmp_path / "empty"}),
        ("--images .*nowhere is not a folder", folder, {"images": tmp_path / "nowhere"}),
        ("--prompts .*nowhere cannot be read", folder, {"prompts": tmp_path / "nowhere"}),
        ("blank.txt has no prompts", folder, {"prompts": tmp_path / "blank.txt"}),
        ("out.txt: the result is a .json file", folder, {"output": tmp_path / "out.txt"}),
        (r"unknown options \['stepz'\]", folder, {"stepz": 3}),
        ("--device foo: ", folder, {"device": "foo"}),
        ("--device cuda:99: ", folder, {"device": "cuda:99"}),
        ("--clip .*empty cannot be loaded as a CLIP model", folder, {"metrics": ["fid-clip"], "clip_name": str(tmp_path / "empty")}),
        ("holds no converted model: edit_compile.json is missing", tmp_path, {}),
    ):
        with pytest.raises(ec.EditCompileError, match=reason):
            run(where, **{"output": tmp_path / "out.json"} | options)
    assert not (tmp_path / "out").exists()


def test_a_model_of_videos_is_refused(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(compare_samples.demo, "sample", lambda *args, **options: torch.zeros(1, 3, 8, 24, 24))
    with pytest.raises(ec.ConfigError, match="the model makes videos, 8 frames each: only images are evaluated"):
        run(folder, tmp_path / "out.json")


def test_at_the_command_line(folder, prompts, tmp_path):
    arguments = ["evaluate", str(folder), "--prompts", str(prompts), "--metrics", "difference", "--steps", "1", "--size", "32x48"]
    result = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "out.json")], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "3 images each of teacher and student, 32 x 48 px, seeds 0 to 2, steps 1, guidance default, float32" in result.stdout
    assert "torchmetrics" in result.stdout
    again = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "out.json"), "--json"])
    assert json.loads(again.stdout) == json.loads((tmp_path / "out.json").read_text())
    assert not again.stderr
    wrong = CliRunner().invoke(main, [*arguments, "--metrics", "fid", "-o", str(tmp_path / "other.json")])
    assert wrong.exit_code == 1
    assert wrong.stderr.startswith("error: --metrics fid: unknown metric; there are: ")


def test_the_metric_of_torchmetrics_takes_the_network(clip_folder):
    """Its features are compared in float64, whatever the network's dtype."""
    metric = FrechetInceptionDistance(Clip(str(clip_folder)))
    images = torch.randint(0, 255, (4, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    metric.update(images, real=True)
    metric.update(images, real=False)
    assert float(metric.compute()) == pytest.approx(0, abs=1e-5)
