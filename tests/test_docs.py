"""What README and documentation say runs: their blocks of Python, their commands and files, their links, the site as a whole.

A comment before a block says what is special about it: `<!-- test: skip: why -->`, `<!-- test: slow -->`, and of commands
`<!-- test: run -->`; without it they are parsed only.
"""

from __future__ import annotations

import ast
import copy
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

import edit_compile as ec
from edit_compile.adapters.input_file import read_example_inputs
from edit_compile.cli import main
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.distillation.train.losses import LOSSES
from edit_compile.study.schema import Study
from edit_compile.version import made_by_another

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "bash", "yaml", "toml", "text", "console"}
BLOCK = re.compile(r"(?:^<!-- test: ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    marks: frozenset[str]

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in BLOCK.finditer(text):
        said = match[1] or ""
        marks = {"skip"} if said.startswith("skip: ") else {word.strip() for word in said.split(",") if said}
        line = text.count("\n", 0, match.start(3))
        found.append(Block(page, line, match[2], match[3], frozenset(marks)))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def chosen(language: str, *, runs: bool = False) -> list[object]:
    """The blocks of a language that are not skipped, as parameters of a test."""
    blocks = [block for block in BLOCKS if block.language == language and "skip" not in block.marks and ("run" in block.marks or not runs)]
    return [pytest.param(block, marks=[pytest.mark.slow] * ("slow" in block.marks), id=block.place) for block in blocks]


def commands_of(block: Block) -> list[list[str]]:
    """The words of each command, without comments and where its output goes."""
    text = block.text.replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line.partition(" > ")[0], comments=True))]


def test_every_block_has_a_language_and_known_marks():
    assert {block.language for block in BLOCKS} <= LANGUAGES, [block.place for block in BLOCKS if block.language not in LANGUAGES]
    assert {mark for block in BLOCKS for mark in block.marks} <= {"skip", "slow", "run"}
    assert sum(block.language == "python" for block in BLOCKS) > 10


# ------------------------------------------------------------------ Python


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder for what the blocks write, and one conversion of each demo model for all of them."""
    students = {}
    original = ec.linearize

    def linearize(model, *more, **options):
        if not isinstance(model, str) or more or options:
            return original(model, *more, **options)
        students[model] = students.get(model) or original(model)
        return copy.deepcopy(students[model])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ec, "linearize", linearize)
        for kept in ("_items", "_origins"):  # what the blocks register is theirs
            patch.setattr(LOSSES, kept, dict(getattr(LOSSES, kept)))
        patch.chdir(tmp_path_factory.mktemp("docs"))
        yield {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", chosen("python"))
def test_python_runs(block, workplace):
    """In the order of the page; what an earlier block of the page names is there."""
    names = workplace.setdefault(block.page, {"ec": ec})
    code = compile(ast.increment_lineno(ast.parse(block.text), block.line), str(block.page), "exec")
    exec(code, names)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=lambda block: block.place)
def test_python_uses_public_names_only(block):
    names = {node.attr for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ec"}
    assert names <= set(ec.__all__)


# ------------------------------------------------------------------ commands


def parsed(words: list[str]) -> click.Context:
    """Parse a command as click does, without running it."""
    context = main.make_context("edit-compile", list(words))
    name, command, rest = main.resolve_command(context, [*context._protected_args, *context.args])
    assert command is not None
    return command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "bash"], ids=lambda block: block.place)
def test_commands_have_these_options(block, tmp_path, monkeypatch):
    for name in ("prompts.txt", "study.yaml", "recipe.yaml", "shapes.yaml", "mine.py"):
        (tmp_path / name).touch()
    for name in ("photos", "images", "distilled", "runs/one", "runs/another", "ranking"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    makefile = (ROOT / "Makefile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for words in commands_of(block):
        if words[0] == "accelerate":
            words = ["edit-compile", *words[words.index("edit_compile.cli") + 1 :]]
        program = Path(words[0]).name
        if program == "edit-compile":
            parsed(words[1:])
        elif program == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
        elif program == "pip":
            assert set(re.findall(r"\[(.*)\]", words[-1])) <= extras.keys()
        elif program == "python" and words[1] != "-m":
            assert (ROOT / words[1]).is_file()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", chosen("bash", runs=True))
def test_commands_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in commands_of(block):
        result = CliRunner().invoke(main, words[1:])
        assert result.exit_code == 0, result.output
        assert result.output


# ------------------------------------------------------------------ YAML


@pytest.mark.parametrize("block", chosen("yaml"))
def test_yaml_is_what_it_says(block, tmp_path):
    """A study, a recipe or a part of one, or example inputs."""
    content = yaml.safe_load(block.text)
    if content is None:  # a comment for editors
        return
    if "configurations" in content:
        assert Study.model_validate(content).configurations
    elif content.keys() <= Recipe.model_fields.keys():
        without_files = {key: value for key, value in content.items() if not (key == "convert" and "ranking" in value)}
        Recipe.model_validate({"model": "demo/dit", "stages": [{"resolution": 32, "steps": 1}]} | without_files)
    else:
        (file := tmp_path / "inputs.yaml").write_text(block.text)
        assert read_example_inputs(file).keys() == content.keys()


# ------------------------------------------------------------------ what the pages claim of the code


def messages() -> set[str]:
    """The texts of the package's strings, with … for what is put in."""

    def text(node: ast.AST) -> str | None:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else None
        if isinstance(node, ast.JoinedStr):
            return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        return None

    trees = [ast.parse(path.read_text()) for path in (ROOT / "edit_compile").rglob("*.py")]
    return {found for tree in trees for node in ast.walk(tree) if (found := text(node))}


def test_messages_in_troubleshooting_are_those_of_the_code():
    headings = re.findall(r"^### (`+)(.+?)\1$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) > 30
    by_another = made_by_another("…").replace(ec.__version__, "…")  # a part of several
    known = {message.replace("was …", f"was {by_another}") for message in messages()} | messages()
    unknown = [heading.strip() for _, heading in headings if not any(heading.strip() in message for message in known)]
    assert not unknown


def test_the_reference_has_all_public_names():
    described = re.findall(r"^::: edit_compile\.(\w+)$", (ROOT / "docs" / "reference" / "api.md").read_text(), re.MULTILINE)
    assert sorted(described) == sorted(ec.__all__)


def test_the_citation_has_the_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == ec.__version__


def anchors_of(page: Path) -> set[str]:
    """The anchors of headings, as code hosts and the site make them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    made = ("commands/index.md", "reference/recipe.md", "reference/study.md", "reference/design-options.md", "schema.json")
    for target in LINK.findall(FENCED.sub("", page.read_text())):
        path, _, anchor = target.partition("#")
        if "://" in target or path.endswith(made) or path == "api.md":
            continue
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or found.suffix != ".md" or anchor in anchors_of(found) or "api.md" in path, target


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "commands" / "distill" / "index.html").is_file()
    assert (tmp_path / "reference" / "recipe.schema.json").is_file()
