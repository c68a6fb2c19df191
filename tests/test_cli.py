"""The command line: tables, JSON, exit codes, errors in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import edit_compile as ec
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


def test_the_model_is_an_argument_or_an_option(run):
    by_argument, by_option = run("inspect", "demo/dit", "--json"), run("inspect", "--model", "demo/dit", "--json")
    assert by_argument.exit_code == by_option.exit_code == 0, by_argument.stderr
    assert by_argument.stdout == by_option.stdout


def test_set_gives_a_designs_options(run):
    def reductions(*options):
        result = run("inspect", "demo/dit", "--json", *options)
        assert result.exit_code == 0, result.stderr
        found = json.loads(result.stdout)
        return {site["options"].get("reduction") for site in found["sites"] if site["action"] != "keep"}, found["cost"]["added"]

    usual, added = reductions()
    assert usual == {ec.LinearizeConfig(design="edit").choices()[0].options.reduction}
    chosen, fewer = reductions("--set", "reduction=8", "--set", "query=conv-fusion")
    assert chosen == {8}
    assert fewer < added


def test_rules_can_be_set(run):
    rules = "rules=[{paths: transformer_blocks.0.attn1, design: edit, options: {reduction: 2}}]"
    result = run("inspect", "demo/dit", "--json", "--set", rules)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["actions"] == {"edit": 1, "keep": 9}


def test_designs_from_outside_are_offered(run, tmp_path):
    example = Path(__file__).parent.parent / "examples" / "your_own_design.py"
    command = [sys.executable, "-m", "edit_compile", "--import", example]
    for arguments, expected in (
        (["convert", "--help"], "cosine"),
        (["inspect", "demo/dit", "--design", "cosine", "--set", "shift=1.5", "--exclude", "*.[1234].*"], "linear attention by cosines"),
    ):
        result = subprocess.run([*command, *arguments], capture_output=True, text=True, env=os.environ | {"COLUMNS": "160"})
        assert result.returncode == 0, result.stderr
        assert expected in result.stdout
    result = run("--import", tmp_path / "nowhere.py", "inspect", "demo/dit")
    assert result.exit_code == 1
    assert "nowhere.py: FileNotFoundError" in result.stderr


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


def test_convert_has_a_folder_of_its_own(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = run("convert", "demo/dit")
    assert first.exit_code == 0, first.stderr
    assert "saved to converted/dit. " in first.stderr
    index = tmp_path / "converted" / "dit" / "edit_compile.json"
    before = index.read_bytes()
    again = run("convert", "demo/dit", "--set", "reduction=2")
    assert again.exit_code == 1
    assert "converted/dit holds a checkpoint already; choose another folder with -o, or replace it with --overwrite" in again.stderr
    assert index.read_bytes() == before
    replaced = run("convert", "demo/dit", "--set", "reduction=2", "--overwrite", "--json")
    assert replaced.exit_code == 0, replaced.stderr
    assert json.loads(replaced.stdout)["output"] == "converted/dit"
    assert index.read_bytes() != before


@pytest.mark.parametrize(
    ("output", "message"),
    [("file", "file is a file, not a folder"), ("file/inside", "file/inside cannot be written: Not a directory")],
)
def test_the_output_is_checked_before_the_model_is_loaded(run, tmp_path, monkeypatch, output, message):
    monkeypatch.setattr(ec, "load_model", lambda *arguments, **options: pytest.fail("the model is loaded first"))
    (tmp_path / "file").write_text("")
    result = run("convert", "demo/dit", "-o", tmp_path / output)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_conversion_leaves_no_folder(run, tmp_path):
    result = run("convert", "demo/dit", "--include", "nowhere", "-o", tmp_path / "a" / "b")
    assert result.exit_code == 1
    assert not list(tmp_path.iterdir())


PROMPT = "a picture with a black background showing a small red circle in the upper left part of the picture and nothing else"


def test_sample_from_python(converted, tmp_path):
    """A folder, or the student itself: the same images, teacher's and student's."""
    folder, _ = converted
    by_folder = ec.sample(folder, PROMPT, steps=2, seed=3)
    by_student = ec.sample(ec.load(folder), [PROMPT], steps=2, seed=3, base="demo/mm-dit")
    for one, other in ((by_folder.teacher, by_student.teacher), (by_folder.student, by_student.student)):
        assert np.array_equal(one[0], other[0])
    assert by_folder.student[0].shape == (32, 32, 3)
    assert not np.array_equal(by_folder.student[0], by_folder.teacher[0])
    by_folder.save(tmp_path / "grid.webp")
    with Image.open(tmp_path / "grid.webp") as image:
        assert image.format == "WEBP"
    with pytest.raises(ec.ConfigError, match=r"unknown options \['strength'\]; there are: height, width"):
        ec.sample(folder, PROMPT, strength=1)
    with pytest.raises(ec.ConfigError, match="no prompt"):
        ec.sample(folder, [])


def test_sample_writes_what_the_ending_says(run, converted, tmp_path):
    result = run("sample", converted[0], "--prompt", PROMPT, "--steps", 1, "-o", tmp_path / "grid.jpg")
    assert result.exit_code == 0, result.stderr
    with Image.open(tmp_path / "grid.jpg") as image:
        assert image.format == "JPEG"
    result = run("sample", converted[0], "--prompt", PROMPT, "-o", tmp_path / "grid.txt")
    assert result.exit_code == 1
    assert "grid.txt: images are written as .png, .jpg, .jpeg, .webp, .gif, not as .txt" in result.stderr


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
    expected = models.sample(ec.load_model("demo/mm-dit").model, [PROMPT], seed=5, steps=3, height=32, width=40)[0]
    expected = (expected.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    assert np.array_equal(teacher[::enlarged, ::enlarged], expected)
    assert not np.array_equal(teacher, student)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", "a red elephant"), "does not know ['elephant']"),
        (("--prompt", PROMPT, "--height", "33"), "33 x 32 px: demo/mm-dit makes samples whose sides are multiples of 2"),
        (("--prompt", PROMPT, "--dtype", "bfloat16"), "the demo models sample in float32, not in bfloat16"),
    ],
)
def test_sample_says_what_it_cannot_sample(run, converted, tmp_path, options, message):
    result = run("sample", converted[0], *options, "-o", tmp_path / "grid.png")
    assert result.exit_code == 1
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("inspect", "--model", "demo/none"), 1, "error: no demo model 'none'; there are: mm-dit"),
        (("convert", "--model", "arch/dit-xl-2", "-o", "x"), 1, "is structure only, without weights"),
        (("inspect", "--model", "demo/mm-dit", "--include", "nowhere"), 1, "error: 'nowhere' matches no site; there are:"),
        (("inspect", "demo/mm-dit", "--set", "eta=best"), 1, "error: eta='best': input should be 'ratio', 'exact' or 'calibrated'"),
        (("inspect", "demo/mm-dit", "--set", "reducton=2"), 1, "error: unknown option 'reducton': did you mean 'reduction'?"),
        (("inspect", "demo/mm-dit", "--set", "reduction"), 1, "error: --set 'reduction': write KEY=VALUE"),
        (("inspect", "demo/mm-dit", "--set", "include=*"), 1, "error: --set include=*: this is the option --include"),
        (("inspect", "demo/mm-dit", "--set", "reduction=[2"), 1, "the value is not valid YAML"),
        (("inspect", "demo/mm-dit", "--design", "edti"), 1, "error: unknown design 'edti': did you mean 'edit'? there are: edit, mm-edit"),
        (
            ("inspect", "--model", "demo/mm-dit", "--size", "big"),
            2,
            "'big' is neither PX nor HEIGHTxWIDTH nor, of videos, FRAMESxHEIGHTxWIDTH",
        ),
        (("inspect",), 2, "give one model, as MODEL or as --model MODEL"),
        (("inspect", "demo/dit", "--model", "demo/mm-dit"), 2, "give one model, as MODEL or as --model MODEL"),
        (("inspct", "demo/dit"), 2, "No such command 'inspct'"),
    ],
)
def test_errors_are_one_line_and_say_what_to_do(run, arguments, code, message):
    result = run(*arguments)
    assert result.exit_code == code
    assert message in result.stderr
    if code == 1:
        assert len(result.stderr.strip().splitlines()) == 1
