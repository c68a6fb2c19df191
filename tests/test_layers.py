"""Who may import what."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import edit_compile

PACKAGE = Path(edit_compile.__file__).parent
FILES = sorted(p for p in PACKAGE.rglob("*.py"))
ONLY = {  # a library, and the files that may import it
    "diffusers": ("adapters/", "demo/", "student/checkpoint.py"),
    "timm": ("adapters/",),
    "click": ("cli.py",),
    "rich": ("cli.py", "report/", "distillation/console.py"),
}
BELOW = {  # a layer, and the layers it must not know
    "tokens.py": ("passes", "designs", "api", "checkpoint", "cli", "plans", "adapters"),
    "plans.py": ("passes", "designs", "api", "checkpoint", "cli", "adapters"),
    "passes/": ("api", "checkpoint", "cli", "report", "sites", "grid", "adapters"),
    "designs/": ("api", "checkpoint", "cli", "report", "sites", "grid", "adapters"),
    "bench/": ("cli", "report", "checkpoint", "distill"),
    "naming.py": ("passes", "designs", "api", "checkpoint", "cli", "report", "bench", "adapters"),
    "api.py": ("checkpoint", "cli", "report"),
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_run_one_way(path):
    own = path.relative_to(PACKAGE).as_posix()
    for name in imported(path):
        allowed = ONLY.get(name.split(".")[0])
        assert allowed is None or own.startswith(allowed), f"{own} imports {name}"
        for layer, above in BELOW.items():
            if own.startswith(layer):
                assert not name.startswith(tuple(f"edit_compile.{module}" for module in above)), f"{own} imports {name}"


def test_importing_the_package_is_lean():
    heavy = ("accelerate", "click", "datasets", "diffusers", "rich", "timm", "transformers")
    code = f"import sys, edit_compile; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
