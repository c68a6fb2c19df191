"""The command line: tables, JSON, exit codes, errors in one line."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from PIL import Image

import edit_compile as ec
from edit_compile.cli import UNTRAINED, main
from edit_compile.cli.parameters import converted_model, original_model
from edit_compile.demo import models
from edit_compile.demo.text import TEXT_CHANNELS, TEXT_LENGTH
from edit_compile.distillation.recipe.load import load_recipe
from edit_compile.distillation.recipe.names import find_recipe

pytestmark = pytest.mark.usefixtures("compiled_once")
DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def run():
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def converted(run, tmp_path_factory):
    """`convert --model demo/mm-dit`: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("converted") / "out"
    return folder, run("convert", "--model", "demo/mm-dit", "--min-tokens", 20, "-o", folder, "--json")


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
    code = f"""
from edit_compile.cli import main
for words in (["convert", "--help"], ["inspect", "demo/dit", "--design", "cosine", "--set", "shift=1.5", "--exclude", "*.[1234].*"]):
    main(["--import", {str(example)!r}, *words], standalone_mode=False)
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "160"}, timeout=150)
    assert result.returncode == 0, result.stderr
    shown = " ".join(result.stdout.split())
    assert re.search(r"or one of: [\w ,-]*\bcosine\b", shown)
    assert "linear attention by cosines" in shown
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
    assert found["min_tokens"] == ec.plan_of(student).min_tokens == 20
    assert all(p.isfinite().all() for p in student.parameters())
    with torch.no_grad():
        x, text, pooled = torch.randn(1, 3, 24, 32), torch.randn(1, TEXT_LENGTH, TEXT_CHANNELS), torch.randn(1, TEXT_CHANNELS)
        y = student(hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=torch.ones(1)).sample
    assert y.shape == x.shape


@pytest.mark.slow
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
    running = Path("running")
    running.mkdir()
    (running / "metrics.jsonl").touch()
    assert "running holds a distillation already" in run("convert", "demo/dit", "-o", "running").stderr
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
        (("inspect", "demo/mm-dit", "--set", "reducton=2"), 1, "error: unknown option 'reducton'; did you mean reduction?"),
        (("inspect", "demo/mm-dit", "--set", "reduction"), 1, "error: --set 'reduction': write KEY=VALUE"),
        (("inspect", "demo/mm-dit", "--set", "include=*"), 1, "error: --set include=*: this is the option --include"),
        (("inspect", "demo/mm-dit", "--set", "reduction=[2"), 1, "the value is not valid YAML"),
        (("inspect", "demo/mm-dit", "--design", "edti"), 1, "error: unknown design 'edti'; did you mean edit? there are: edit, mm-edit"),
        (
            ("inspect", "--model", "demo/mm-dit", "--size", "big"),
            2,
            "'big' is neither PX nor HEIGHTxWIDTH nor, of videos, FRAMESxHEIGHTxWIDTH",
        ),
        (("inspect",), 2, "give one model, as MODEL or as --model MODEL"),
        (("inspect", " "), 2, "give one model, as MODEL or as --model MODEL"),
        (
            ("distill", "demo-dit", "--set", "lr=3", "-o", "x"),
            1,
            "--set lr=3: lr: unknown key; did you mean layerwise.lr or stages.0.lr?\n",
        ),
        (("distill", "demo-dit", "--set", "stages.0.stps=3", "-o", "x"), 1, "stages.0.stps: unknown key; did you mean steps? "),
        (("distill", "demo-dit", "--set", "stages.0.stps=3", "-o", "x"), 1, ", loss_weighting, snr_gamma\n"),
        (("sample", f"{DOCS}/guide", "--prompt", "x", "-o", "x.png"), 1, f"or a hub id: did you mean {DOCS}/guides?"),
        (("export", ".", "--dynamic", "hight", "-o", "x.pt2"), 1, "dynamic=('hight',): a list of names, of batch, frames"),
        (("inspect", "demo/dit", "--model", "demo/mm-dit"), 2, "give one model, as MODEL or as --model MODEL"),
        (("inspct", "demo/dit"), 2, "No such command 'inspct'. Did you mean 'inspect'?"),
        (("inspect", "demo/dti"), 1, "error: no demo model 'dti'; did you mean dit? there are: mm-dit"),
        (("rank", "arch/sd3.5-meduim"), 1, "error: no built-in architecture 'sd3.5-meduim'; did you mean sd3.5-medium? there are:"),
        (("convert", "flux-dve"), 1, "error: flux-dve does not exist; give a folder"),
        (("inspect", "sd3.5-medum"), 1, "timm/NAME or a hub id: did you mean sd3.5-medium?"),
        (
            ("distill", "demo-mm-dti"),
            1,
            "error: no recipe 'demo-mm-dti': neither a file nor one of the shipped ones; did you mean demo-mm-dit?",
        ),
        (("cache", "nowhere", "-o", "x"), 1, "error: no recipe 'nowhere'"),
        (("recipe", "demo-dti", "--explain"), 1, "did you mean demo-dit?"),
        (("recipe", "--explain"), 2, "--explain and --set are for a recipe: give its NAME"),
        (("convert", "demo/dit", "--standalone", "--min-tokens", "20"), 2, "--standalone writes no original attention"),
        (("sample", "--prompt", "x", "-o", "grid.bmp", "demo/dit"), 1, "images are written as .png, .jpg, .jpeg, .webp, .gif, not as .bmp"),
        (("evaluate", "demo/dit", "--prompts", "nowhere.txt"), 1, "error: --prompts nowhere.txt: there is no such file"),
        (("evaluate", "demo/dit", "--prompts", __file__, "--images", "nowhere"), 1, "error: --images nowhere: there is no such folder"),
        (("bench", "demo/dit", "--plot", "speed.txt"), 1, "error: speed.txt: plots are written as ."),
        (("report", ".", "-o", "page.txt"), 1, "error: -o page.txt: the page is an .html file"),
        (("inspect", "demo/dit", "--example-inputs", "nowhere.yaml"), 1, "error: --example-inputs nowhere.yaml: there is no such file"),
    ],
)
def test_errors_are_one_line_and_say_what_to_do(run, arguments, code, message):
    result = run(*arguments)
    assert result.exit_code == code
    assert message in result.stderr
    if code == 1:
        assert len(result.stderr.strip().splitlines()) == 1


# ------------------------------------------------------------------ what all commands have


COMMANDS = sorted(main.commands)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("columns", [None, "80"])
def test_every_command_explains_itself(name, columns, tmp_path, monkeypatch):
    """-h is --help; every option says what it is, and there are examples, which parse and fit into a terminal."""
    (tmp_path / "runs" / "demo-dit").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, [name, "-h"], env={"COLUMNS": columns})
    assert result.exit_code == 0
    assert result.stdout == CliRunner().invoke(main, [name, "--help"], env={"COLUMNS": columns}).stdout
    command = main.commands[name]
    assert [option.name for option in command.params if isinstance(option, click.Option) and not option_help(command, option)] == []
    assert {"--json", "-q", "-v"} <= {word for option in command.params for word in option.opts}
    examples = [line.strip() for line in result.stdout.partition("Examples:")[2].splitlines() if line.strip()]
    assert examples
    for example in examples:
        assert len(example) <= 78
        words = shlex.split(example.partition(" > ")[0])
        assert words[:2] == ["edit-compile", name]
        command.make_context(name, words[2:])


def option_help(command: click.Command, option: click.Option) -> str:
    with click.Context(command) as context:
        record = option.get_help_record(context)
    return record[1] if record is not None else ""


@pytest.mark.parametrize("name", ["bench", "convert", "evaluate", "inspect", "rank", "sample"])
def test_model_has_the_same_place_everywhere(name):
    (argument,) = [each for each in main.commands[name].params if isinstance(each, click.Argument)]
    assert (argument.name, argument.required) == ("model", False)
    result = CliRunner().invoke(main, [name, *({"sample": ("--prompt", "x", "-o", "x.png"), "evaluate": ("--prompts", "x")}.get(name, ()))])
    assert result.exit_code == 2
    assert "give one model, as MODEL or as --model MODEL" in result.stderr


def test_addresses_and_names_of_recipes_stand_for_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    medium = "stabilityai/stable-diffusion-3.5-medium"
    for name in (medium, f"https://huggingface.co/{medium}", f"https://hf.co/{medium}/tree/main", f"hf://{medium}", "sd3.5-medium"):
        assert original_model(name) == medium
    with pytest.raises(ec.ModelNotFoundError, match=r"runs/demo-dit does not exist yet: `edit-compile distill demo-dit` makes it"):
        converted_model("demo-dit")
    (tmp_path / "runs" / "demo-dit").mkdir(parents=True)
    assert converted_model("demo-dit") == "runs/demo-dit"
    assert converted_model(f"https://huggingface.co/{medium}?x=1") == medium
    (tmp_path / "sd3.5-medium").mkdir()
    assert original_model("sd3.5-medium") == "sd3.5-medium"
    (tmp_path / "mine.yaml").write_text(f"model: {medium}")
    assert original_model("mine.yaml") == medium
    with pytest.raises(ec.ModelNotFoundError, match=r"runs/mine does not exist yet: `edit-compile distill mine.yaml` makes it"):
        converted_model("mine.yaml")
    (tmp_path / "runs" / "mine").mkdir()
    assert converted_model("mine.yaml") == "runs/mine"
    for content, said in (("model: [", "mine.yaml is not valid YAML"), ("- a", "mine.yaml is not a recipe: it names no model")):
        (tmp_path / "mine.yaml").write_text(content)
        with pytest.raises(ec.RecipeError, match=said):
            original_model("mine.yaml")


def test_names_complete():
    def completed(*words):
        return [item.value for item in ShellComplete(main, {}, "edit-compile", "_X").get_completions(list(words[:-1]), words[-1])]

    assert {"demo/dit", "demo/dit-64"} <= set(completed("inspect", "demo/d"))
    assert {"arch/sd3.5-medium", "arch/sd3.5-large"} <= set(completed("convert", "--model", "arch/sd"))
    assert {"demo-mm-dit", "demo-mm-dit-64"} <= set(completed("distill", "demo-mm"))
    assert completed("inspect", "demo/dit", "--design", "mm-")[0] == "mm-edit"
    assert "--explain" in completed("recipe", "--e")


def test_nothing_heavy_is_imported_to_refuse_or_to_complete():
    for arguments in (
        ["inspect", "demo/dti"],
        ["distill", "nowhere"],
        ["inspect", "demo/dit", "--design", "edti"],
        ["recipe"],
        ["convert", "-h"],
    ):
        code = f"""
import sys
from click.testing import CliRunner
from edit_compile.cli import main
CliRunner().invoke(main, {arguments})
print([m for m in ("torch", "pydantic", "rich", "diffusers") if m in sys.modules])
"""
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout == "[]\n", arguments


def test_recipes_are_listed_printed_and_explained(run, tmp_path):
    listed = run("recipe")
    assert listed.exit_code == 0
    assert "sd3.5-medium    Stable Diffusion 3.5 medium: 37 sites" in listed.stdout
    assert json.loads(run("recipe", "--json").stdout)["demo-dit"]["model"] == "demo/dit"
    assert run("recipe", "demo-dit").stdout == find_recipe("demo-dit").read_text()
    (tmp_path / "latin.yaml").write_bytes(b"model: \xff")
    assert run("recipe", tmp_path / "latin.yaml").stderr.startswith(f"error: {tmp_path / 'latin.yaml'} cannot be read: ")
    explained = run("recipe", "demo-dit", "--explain", "--set", "stages.0.steps=7")
    assert explained.exit_code == 0, explained.stderr
    assert "# Optimizer steps.\n" in explained.stdout
    assert all(len(line) <= 100 for line in explained.stdout.splitlines() if line.lstrip().startswith("#"))
    (tmp_path / "mine.yaml").write_text(explained.stdout)
    expected = load_recipe("demo-dit", ["stages.0.steps=7"])
    assert load_recipe(tmp_path / "mine.yaml") == expected
    assert json.loads(run("recipe", tmp_path / "mine.yaml", "--json").stdout) == expected.model_dump(mode="json")


def test_quiet_says_results_only_and_verbose_where_errors_come_from(run, tmp_path):
    quiet = run("convert", "demo/dit", "-q", "-o", tmp_path / "out", "--json")
    assert (quiet.exit_code, quiet.stderr) == (0, "")
    assert json.loads(quiet.stdout)["parameters_added"] > 0
    verbose = run("inspect", "demo/dti", "-v")
    assert "Traceback" in verbose.stderr
    assert verbose.stderr.endswith("dit-64, video-dit\n")
