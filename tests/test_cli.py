"""The command line: tables, JSON, exit codes, errors in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import edit_compile as ec
from edit_compile.adapters.load_model import load_model
from edit_compile.cli import UNTRAINED, main
from edit_compile.demo import models
from edit_compile.demo.text import TEXT_CHANNELS, TEXT_LENGTH


@pytest.fixture(scope="module")
def run():
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def converted(run, tmp_path_factory):
    """`convert --model demo/mm-dit`: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("converted") / "out"
    return folder, run("convert", "--model", "demo/mm-dit", "-o", folder, "--json")


def test_inspect_shows_the_plan(run):
    result = run("inspect", "--model", "demo/mm-dit")
    assert result.exit_code == 0
    assert "5 of 5 attention sites rewritten" in result.stdout
    assert "transformer_blocks.{0..3}.attn" in result.stdout
    assert "mm-edit" in result.stdout
    assert "image h*w, text t" in result.stdout
    assert "parameters added to" in result.stdout
    assert "64 x 64" in result.stdout


def test_inspect_gives_all_of_it_as_json(run):
    result = run("inspect", "--model", "demo/mm-dit", "--json", "--size", "32x64", "--size", 256, "--text", 8)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["actions"] == {"mm-edit": 4, "edit": 1}
    ((cost,), impossible) = (found["cost"]["costs"], found["cost"]["impossible"])
    assert (cost["height"], cost["width"], cost["image"], cost["text"]) == (32, 64, 512, 8)
    assert cost["before"] > cost["after"] > 0
    assert list(impossible) == ["256 x 256"]
    assert [site["path"] for site in cost["sites"]] == [site["path"] for site in found["sites"]]


def test_inspect_without_a_site_to_convert_has_no_costs(run):
    result = run("inspect", "--model", "demo/mm-dit", "--exclude", "*", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["cost"] is None


def test_convert_saves_what_load_reads(converted):
    folder, result = converted
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["actions"] == {"mm-edit": 4, "edit": 1}
    assert found["parameters_added"] > 0
    assert UNTRAINED in result.stderr
    student = ec.load(folder)
    assert all(p.isfinite().all() for p in student.parameters())
    with torch.no_grad():
        x, text, pooled = torch.randn(1, 3, 24, 32), torch.randn(1, TEXT_LENGTH, TEXT_CHANNELS), torch.randn(1, TEXT_CHANNELS)
        y = student(hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=torch.ones(1)).sample
    assert y.shape == x.shape


PROMPT = "a picture with a black background showing a small red circle in the upper left part of the picture and nothing else"


def test_sample_draws_teacher_and_student_side_by_side(run, converted, tmp_path):
    folder, _ = converted
    options = ("--height", 32, "--width", 40, "--steps", 3, "--seed", 5)
    result = run("sample", folder, "--prompt", PROMPT, "--prompt", PROMPT, *options, "-o", tmp_path / "grid.png")
    assert result.exit_code == 0, result.stderr
    with Image.open(tmp_path / "grid.png") as image:
        sheet = np.asarray(image)
    enlarged, gap, left, top = 5, 8, 266, 46
    teacher = sheet[top : top + 32 * enlarged, left : left + 40 * enlarged]
    student = sheet[top : top + 32 * enlarged, left + 40 * enlarged + gap :][:, : 40 * enlarged]
    expected = models.sample(load_model("demo/mm-dit").model, [PROMPT], seed=5, steps=3, height=32, width=40)[0]
    expected = (expected.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    assert np.array_equal(teacher[::enlarged, ::enlarged], expected)
    assert not np.array_equal(teacher, student)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", "a red elephant"), "do not know ['elephant']"),
        (("--prompt", PROMPT, "--height", "33"), "33 x 32 px: the demo models draw pictures whose sides are multiples of 2"),
        (("--prompt", PROMPT, "--dtype", "bfloat16"), "the demo models draw in float32, not in bfloat16"),
    ],
)
def test_sample_says_what_it_cannot_draw(run, converted, tmp_path, options, message):
    result = run("sample", converted[0], *options, "-o", tmp_path / "grid.png")
    assert result.exit_code == 1
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("inspect", "--model", "demo/none"), 1, "error: no demo model 'none'; there are: mm-dit"),
        (("convert", "--model", "arch/dit-xl-2", "-o", "x"), 1, "is structure only, without weights"),
        (("inspect", "--model", "demo/mm-dit", "--include", "nowhere"), 1, "error: 'nowhere' matches no attention; there are:"),
        (("inspect", "--model", "demo/mm-dit", "--eta", "best"), 2, "'best' is not one of 'ratio', 'exact', 'calibrated'"),
        (("inspect", "--model", "demo/mm-dit", "--size", "big"), 2, "'big' is neither PX nor HEIGHTxWIDTH"),
        (("inspect",), 2, "Missing option '--model'"),
    ],
)
def test_errors_are_one_line_and_say_what_to_do(run, arguments, code, message):
    result = run(*arguments)
    assert result.exit_code == code
    assert message in result.stderr
    if code == 1:
        assert len(result.stderr.strip().splitlines()) == 1
