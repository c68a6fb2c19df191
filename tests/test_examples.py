"""Every example runs as its reader would run it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import edit_compile

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


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


def test_your_own_design_is_short():
    assert len((EXAMPLES[0].parent / "your_own_design.py").read_text().splitlines()) <= 60
