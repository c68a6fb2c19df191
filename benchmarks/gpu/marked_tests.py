"""The tests that are marked `gpu`, a unit for each file that has some."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.gpu.step import Failed, Row, Unit, Work

_ROOT = Path(__file__).parents[2]
_MARK = "@pytest.mark.gpu"


def units(tiny: bool) -> list[Unit]:
    marked = sorted(path.relative_to(_ROOT) for path in (_ROOT / "tests").rglob("test_*.py") if _MARK in path.read_text())
    return [Unit(str(path), partial(_run, str(path))) for path in marked]


def _run(name: str, work: Work) -> list[Row]:
    """Run them without this project's options for pytest, some of which need plugins."""
    options = [
        "-m",
        "gpu",
        "-q",
        "-rfE",
        "--maxfail=20",
        "-o",
        "addopts=",
        "-o",
        "timeout=0",
        "-o",
        "faulthandler_timeout=0",
        "-W",
        "default",
        "-p",
        "no:cacheprovider",
    ]
    command = [sys.executable, "-m", "pytest", *options, name]
    said = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    print(said.stdout[-6000:], said.stderr[-2000:], sep="\n", flush=True)
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|error)", said.stdout)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", said.stdout, re.M)
    if said.returncode > 1 or (said.returncode == 1 and not failed):
        raise RuntimeError((said.stderr.strip() or said.stdout.strip() or "pytest said nothing").splitlines()[-1])
    row: Row = {"tests": name, **{what: counts.get(what, 0) for what in ("passed", "failed", "skipped")}, "which failed": ", ".join(failed)}
    if failed:
        raise Failed(f"{len(failed)} tests fail", [row])
    return [row]
