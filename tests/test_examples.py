"""Every example runs as its reader would run it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import edit_compile

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES, NOTEBOOK = sorted(FOLDER.glob("*.py")), FOLDER / "notebook.ipynb"


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path):
    result = subprocess.run([sys.executable, "-W", "error", path], capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr
    assert result.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_uses_public_names_only(path):
    tree = ast.parse(path.read_text())
    own = [alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names if "edit_compile" in alias.name]
    assert [(alias.name, alias.asname) for alias in own] == [("edit_compile", "ec")]
    assert not [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "edit_compile" in str(node.module)]
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    used = {node.attr for node in attributes if node.value.id == "ec"}
    assert used <= set(edit_compile.__all__)


@pytest.mark.slow
def test_the_notebook_runs_and_shows_its_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, shown = {}, []
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            tree = ast.parse("".join(cell["source"]))
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, NOTEBOOK.name, "exec"), names)
            if last is not None:
                shown.append(eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names))
    assert len(shown) == 4
    assert all({"_repr_html_", "_repr_png_"} & set(dir(value)) for value in shown)
    assert names["result"].after.total < 0.3 * names["result"].before.total


def test_your_own_design_is_short():
    assert len((FOLDER / "your_own_design.py").read_text().splitlines()) <= 60
