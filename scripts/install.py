"""Installs this checkout into the environment that runs it, with pinned versions: `.venv/bin/python scripts/install.py CONSTRAINTS EXTRAS`.

On a machine without a GPU it takes torch's builds for the CPU where pip's index offers them (versions that end in +cpu): they need no CUDA
libraries, which are gigabytes. It says which it takes, and names every large file that pip downloads.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
BUILT_FOR_DEVICES = ("torch", "torchvision")
CUDA = ("cuda-", "nvidia-", "triton")  # how the names of packages begin that only builds for CUDA need
_LARGE = re.compile(r"Downloading (\S+) \(([\d.]+) (MB|GB)\)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("constraints", type=Path)
    parser.add_argument("extras", help="of pyproject.toml, with commas")
    arguments = parser.parse_args()
    lines = arguments.constraints.read_text().splitlines()
    what = "its builds with CUDA"
    if not has_gpu():
        on_cpu = for_cpu(lines)
        if offered([line for line in on_cpu if line.endswith("+cpu")]):
            lines, what = on_cpu, "its builds for the CPU"
        else:
            what = "its usual builds, with whatever CUDA libraries they need: pip's index offers none for the CPU alone"
    torch = next(line.partition("==")[2] for line in lines if line.startswith("torch=="))
    print(f"installing the versions of {arguments.constraints} into {sys.prefix}: torch {torch}, {what}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "constraints.txt"
        pins.write_text("\n".join(lines))
        return install("-c", str(pins), "-e", f".[{arguments.extras}]")


def has_gpu() -> bool:
    """Say whether there is a GPU of a kind that torch has builds for."""
    return sys.platform == "darwin" or any(shutil.which(tool) for tool in ("nvidia-smi", "rocm-smi"))


def for_cpu(lines: Iterable[str]) -> list[str]:
    """Return constraints with torch's builds for the CPU, and without what those for CUDA need."""
    kept = [line for line in lines if not line.startswith(CUDA)]
    return [f"{line}+cpu" if line.partition("==")[0] in BUILT_FOR_DEVICES else line for line in kept]


def offered(requirements: Iterable[str]) -> bool:
    """Ask pip's index whether it has these."""
    asked = [*PIP, "install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed", *requirements]
    return subprocess.run(asked, capture_output=True, check=False).returncode == 0


def install(*arguments: str) -> int:
    """Let pip install, naming the files of ten megabytes and more that it downloads; returns its exit status."""
    pip = subprocess.Popen([*PIP, "install", "--progress-bar", "off", *arguments], stdout=subprocess.PIPE, text=True)
    assert pip.stdout is not None
    for line in pip.stdout:
        found = _LARGE.search(line)
        if found and (found[3] == "GB" or float(found[2]) >= 10):
            print(f"  {found[1]}, {found[2]} {found[3]}", flush=True)
    return pip.wait()


if __name__ == "__main__":
    sys.exit(main())
