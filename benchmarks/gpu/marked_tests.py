"""The tests that are marked `gpu`, a unit for each function: those of a file together may compile for longer than a step takes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.gpu.step import Failed, Row, Unit, Work

_ROOT = Path(__file__).parents[2]
_MARK = "pytest.mark.gpu"
_OPTIONS = (  # without this project's own, some of which need plugins
    *("-m", "gpu", "-q", "-rfE", "--maxfail=20", "-W", "default", "-p", "no:cacheprovider"),
    *("-o", "addopts=", "-o", "timeout=0", "-o", "faulthandler_timeout=0"),
)


def units(tiny: bool) -> list[Unit]:
    """List them; for a rehearsal the first one of each file."""
    found = [(path, list(_marked(path.read_text()))) for path in sorted((_ROOT / "tests").rglob("test_*.py"))]
    names = [f"{path.relative_to(_ROOT)}::{test}" for path, tests in found for test in (tests[:1] if tiny else tests)]
    return [Unit(name, partial(_run, name)) for name in names]


def _marked(text: str) -> Iterator[str]:
    """Yield the names of a file's tests that are marked, one by one or all of them."""
    body = ast.parse(text).body if _MARK in text else []
    assigned = [node for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"]
    marks_all = any(_MARK in ast.unparse(node.value) for node in assigned)
    for node in body:
        is_test = isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if is_test and (marks_all or any(_MARK in ast.unparse(decorator) for decorator in node.decorator_list)):
            yield node.name


def _run(name: str, work: Work) -> list[Row]:
    """Run a test with all of its parameters."""
    said = subprocess.run([sys.executable, "-m", "pytest", *_OPTIONS, name], cwd=_ROOT, capture_output=True, text=True, check=False)
    print(said.stdout[-6000:], said.stderr[-2000:], sep="\n", flush=True)
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|error)", said.stdout)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", said.stdout, re.M)
    if said.returncode > 1 or (said.returncode == 1 and not failed):
        raise RuntimeError((said.stderr.strip() or said.stdout.strip() or "pytest said nothing").splitlines()[-1])
    row: Row = {"tests": name, **{what: counts.get(what, 0) for what in ("passed", "failed", "skipped")}, "which failed": ", ".join(failed)}
    if failed:
        raise Failed(f"{len(failed)} tests fail", [row])
    return [row]
