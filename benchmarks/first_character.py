"""How long a person waits: until each command shows its first character on a terminal, and what is shown in waits of two seconds or more.

python benchmarks/first_character.py            # every command, of -h and of a run, medians of 5
python benchmarks/first_character.py --waits    # runs of small jobs as a whole: what took two seconds or more, and what was shown then

`evaluate` needs the weights of lpips at hand; without them its row is that of the error.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from edit_compile.report.markdown import markdown_table

LEAST = 2.0  # seconds of a wait that is listed
PROMPT = "a picture with a black background showing a small red circle in the upper left part of the picture and nothing else"
SMALL = "--set stages.0.steps=20 --set validation.samples=16 --set validation.batch_size=8 --set samples.count=1"
RUNS = {  # a run of each command, in order: later ones take what earlier ones made
    "inspect": "inspect demo/dit",
    "convert": "convert demo/dit -o converted",
    "recipe": "recipe demo-dit --explain",
    "distill": f"distill demo-dit -o run {SMALL} --set layerwise.steps=20",
    "sample": f"sample run --prompt '{PROMPT}' --steps 4 -o grid.png",
    "evaluate": "evaluate run --prompts prompts.txt --metrics lpips --steps 2",
    "export": "export run --format onnx -o run.onnx",
    "bench": "bench demo/dit --resolutions 32 --runs 1",
    "compare": "compare run converted-run --samples 8",
    "report": "report run",
    "rank": f"rank demo/dit --steps 5 {SMALL}",
    "cache": "cache demo-dit --set data.kind=images --set data.path=images -o cached",
    "env": "env",
}


def first_character(words: list[str], folder: Path) -> float:
    """Return the seconds until a command on a terminal of its own writes anything; it is killed then."""
    terminal, its_end = pty.openpty()
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "edit_compile.cli", *words], stdin=its_end, stdout=its_end, stderr=its_end, cwd=folder
    ) as process:
        os.close(its_end)
        os.read(terminal, 1)
        seconds = time.perf_counter() - began
        process.kill()
    os.close(terminal)
    return seconds


def in_words(seconds: list[float]) -> str:
    """Write the median, and between which they lie."""
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def write_images(folder: Path, count: int = 16) -> None:
    """Write captioned images to be cached."""
    folder.mkdir()
    for number in range(count):
        Image.effect_noise((32, 32), 10 * number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(PROMPT)


def first_characters(folder: Path, times: int) -> str:
    """Return a table of the seconds until each command writes anything."""
    for name in ("run", "converted-run"):  # as far as it is looked at before anything is shown
        (folder / name).mkdir()
        (folder / name / "edit_compile.json").write_text("{}")
    from edit_compile.cli import main

    rows = []
    for name in sorted(main.commands):
        helped = [first_character([name, "-h"], folder) for _ in range(times)]
        line = RUNS.get(name)
        run = [first_character(shlex.split(line), folder) for _ in range(times)] if line is not None else []
        rows.append((name, in_words(helped), in_words(run) if run else "", f"`{line}`" if line else ""))
    return markdown_table(("command", "-h, seconds", "a run, seconds", "the run"), rows)


@dataclass
class Recorder:
    """A listener that writes down when what was shown, and when nothing was."""

    began_at: float
    shown: list[tuple[str, float]] = field(default_factory=list)
    silent: list[tuple[str, str, float]] = field(default_factory=list)
    _open: dict[int, tuple[str, float]] = field(default_factory=dict)
    _last: tuple[str, float] | None = None

    def began(self, work: Any) -> None:
        now = time.perf_counter()
        if not self._open:
            self._silence(work.what, now)
        self._open[id(work)] = (work.what, now)

    def advanced(self, work: Any) -> None:
        pass

    def ended(self, work: Any) -> None:
        now = time.perf_counter()
        what, then = self._open.pop(id(work))
        self.shown.append((what, now - then))
        self._last = (what, now)

    def closed(self) -> None:
        self._silence("the end", time.perf_counter())
        self._last = ("the end", time.perf_counter())

    def _silence(self, upcoming: str, now: float) -> None:
        before, then = self._last or ("the start", self.began_at)
        self.silent.append((before, upcoming, now - then))


def record(words: list[str], file: Path) -> None:
    """Run a command in this process, and write what was shown to a file."""
    recorder = Recorder(time.perf_counter())
    from edit_compile.cli import main

    vars(sys.modules["edit_compile.cli.command"])["_display"] = lambda: recorder
    status = 0
    try:
        main(words, standalone_mode=False)
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    file.write_text(json.dumps({"shown": recorder.shown, "silent": recorder.silent, "status": status}))


def waits(folder: Path) -> str:
    """Return a table of what took two seconds or more in a run of each command, with what was shown meanwhile."""
    rows = []
    for name, line in RUNS.items():
        file = folder / "record.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--record", str(file), *shlex.split(line)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        found = json.loads(file.read_text())
        if found["status"]:
            print(f"{line}: {done.stderr.strip()}", file=sys.stderr)
        if name == "distill":
            shutil.copytree(folder / "run", folder / "converted-run")
        rows += [(name, what, f"{seconds:.1f}") for what, seconds in found["shown"] if seconds >= LEAST]
        rows += [(name, f"nothing, from {a} to {b}", f"{seconds:.1f}") for a, b, seconds in found["silent"] if seconds >= LEAST]
    return markdown_table(("command", "what is shown", "seconds"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5, help="runs of each command")
    parser.add_argument("--waits", action="store_true")
    parser.add_argument("--record", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.record:
        file, *words = options.record
        record(words, Path(file))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images")
        (folder / "prompts.txt").write_text(f"{PROMPT}\n")
        print(waits(folder) if options.waits else first_characters(folder, options.times))


if __name__ == "__main__":
    main()
