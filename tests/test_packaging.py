"""The source archive and the wheel: what is in them, and what the wheel does in an environment with only what the package needs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

import edit_compile as ec
from edit_compile.extras import MODULES

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CAPTION = "a picture with a black background showing a small red circle in the upper left part of the picture and nothing else"
PROVIDED_BY = {"torch_fidelity": "torch-fidelity"}  # where a module's distribution has another name

slow = pytest.mark.slow


def test_what_extras_are_said_to_bring_they_bring():
    extras = PROJECT["optional-dependencies"]
    for extra, modules in MODULES.items():
        brought = {Requirement(line).name for line in extras[extra]}
        assert {PROVIDED_BY.get(name, name) for name in modules} == brought
        (everything,) = extras["all"]
        assert extra in Requirement(everything).extras
    needed = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert not needed & {name for modules in MODULES.values() for name in modules}


def package_files() -> set[str]:
    """All files of the package that belong to it, by their paths in the repository."""
    found = (path for path in (ROOT / "edit_compile").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in found}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The source archive, and the wheel that is built of it."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build"]
    subprocess.run([*build, "-t", "sdist", "-d", folder], cwd=ROOT, check=True, capture_output=True, timeout=100)
    (source,) = folder.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    inside = folder / source.name.removesuffix(".tar.gz")
    subprocess.run([*build, "-t", "wheel", "-d", folder], cwd=inside, check=True, capture_output=True, timeout=100)
    (wheel,) = folder.glob("*.whl")
    return source, wheel


@slow
def test_the_archives_hold_the_package_and_say_what_it_is(archives):
    source, wheel = archives
    assert wheel.name == f"edit_compile-{ec.__version__}-py3-none-any.whl"
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package_files() | {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "tests/test_api.py"} <= names
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
        (scripts,) = (archive.read(name).decode() for name in names if name.endswith("/entry_points.txt"))
    assert {name for name in names if ".dist-info/" not in name} == package_files()
    assert "edit_compile/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert scripts.splitlines() == ["[console_scripts]", "edit-compile = edit_compile.cli:main"]
    assert re.search(r"^Description-Content-Type: text/markdown$", metadata, re.MULTILINE)


def needed_distributions() -> set[str]:
    """What the package needs, and what that needs, as far as it is installed here for this machine."""
    waiting, found = [Requirement(line) for line in PROJECT["dependencies"]], set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found.add(name)
            waiting += [Requirement(line) for line in distribution(name).requires or ()]
    return found


@pytest.fixture(scope="module")
def clean(archives, tmp_path_factory):
    """The folder of programs of an environment with the wheel and what it needs: links to what is installed here."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in needed_distributions():
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(found.locate_file(top))
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index", archives[1]]
    subprocess.run(pip, check=True, capture_output=True, timeout=100)
    return folder / "bin"


def run(clean, *command, cwd):
    """A program of the clean environment, with nothing of this one's."""
    words = [clean / command[0], *map(str, command[1:])]
    environment = {"PATH": f"{clean}:{os.defpath}", "HOME": str(cwd), "COLUMNS": "80"}
    return subprocess.run(words, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200)


@slow
def test_it_says_what_it_is(clean, tmp_path):
    version = run(clean, "edit-compile", "--version", cwd=tmp_path)
    assert version.stdout == f"edit-compile, version {ec.__version__}\n"
    found = run(clean, "edit-compile", "env", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    lines = dict(line.split(maxsplit=1) for line in found.stdout.splitlines())
    assert lines["edit_compile"] == ec.__version__
    assert {lines[name] for name in ("datasets", "peft", "timm", "torchmetrics")} == {"none"}


@slow
def test_a_student_is_loaded_and_draws_the_same_there(clean, tmp_path):
    student = ec.linearize("demo/dit")
    ec.save(student, tmp_path / "student", base="demo/dit")
    code = "import edit_compile as ec; print(type(ec.load('student')).__name__, len(ec.plan_of(ec.load('student')).rewritten))"
    loaded = run(clean, "python", "-c", code, cwd=tmp_path)
    assert loaded.stdout == f"{type(student).__name__} {len(ec.plan_of(student).rewritten)}\n", loaded.stderr
    drawn = run(clean, "edit-compile", "sample", "student", "--prompt", CAPTION, "--steps", 2, "-o", "grid.png", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    ec.sample(tmp_path / "student", CAPTION, steps=2).save(tmp_path / "own.png")
    with Image.open(tmp_path / "grid.png") as one, Image.open(tmp_path / "own.png") as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))


WITHOUT_TORCH = """
import sys
from edit_compile.cli import main
try:
    main(standalone_mode=False)
finally:
    print([name for name in ("torch", "diffusers") if name in sys.modules])
"""


@slow
@pytest.mark.parametrize(
    ("command", "extra", "named"),
    [
        ("distill demo-dit", "distill", "edit-compile distill needs datasets, matplotlib, peft, tensorboard"),
        ("cache demo-dit -o cached", "distill", "edit-compile cache needs datasets"),
        ("rank demo/dit", "distill", "edit-compile rank needs datasets"),
        ("compare designs-dit-64", "distill", "edit-compile compare needs datasets"),
        ("bench demo/dit --plot speed.png", "distill", "--plot needs matplotlib"),
        ("evaluate student --prompts prompts.txt", "eval", "edit-compile evaluate needs torchmetrics"),
        ("inspect timm/vit_tiny_patch16_224", "timm", "timm/vit_tiny_patch16_224 needs timm"),
    ],
)
def test_a_missing_extra_is_named_before_anything_is_loaded(clean, tmp_path, command, extra, named):
    (tmp_path / "student").mkdir()
    (tmp_path / "prompts.txt").write_text(f"{CAPTION}\n")
    refused = run(clean, "python", "-c", WITHOUT_TORCH, *command.split(), cwd=tmp_path)
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert line.startswith(f"error: {named}")
    assert line.endswith(f": pip install 'edit_compile[{extra}]'")
    assert refused.stdout == "[]\n"
