"""Records a session on a terminal of 80 columns as a page: `python scripts/record_session.py docs/session.md` runs the commands.

Of what takes a while, it notes what the terminal showed in the middle of it as well, below the lines that stay.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Sequence
from pathlib import Path

COLUMNS, ROWS = 80, 24
_LOOK = 0.25  # seconds between two looks at the screen
_WAIT = 2.0  # seconds after which somebody who waits wants to know why
_TOKEN = re.compile(r"\x1b\[[?>]?([\d;]*)([@-~])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b.|[\s\S]")
_CAPTION = "a picture with a white background showing a large yellow circle in the upper left part of the picture and nothing else"
SESSION: tuple[tuple[str, str], ...] = (
    (
        "The plan of a model: every attention layer, what would be done to it, and why.",
        "edit-compile inspect demo/dit",
    ),
    (
        "Plan, rewrite, audit, and save what was added.",
        "edit-compile convert demo/dit -o converted",
    ),
    (
        "A distillation, shortened to be shown: the whole recipe takes ten minutes.",
        "edit-compile distill demo-dit --set layerwise.steps=20 --set stages.0.steps=30 -o distilled",
    ),
    (
        "Teacher and student from the same noise. After so few steps they do not agree yet.",
        f'edit-compile sample distilled --prompt "{_CAPTION}" -o grid.png',
    ),
    (
        "Samples are judged by networks that are downloaded. This was recorded without a network, and says so before anything is sampled.",
        "edit-compile evaluate distilled --prompts prompts.txt --metrics clip-score",
    ),
    (
        "What the demo models draw can be checked without: objects drawn as their captions say.",
        "edit-compile compare distilled --samples 10 -o comparison",
    ),
)


class Screen:
    """What a terminal shows of a program's output, with all lines that scrolled away; colours are left out."""

    def __init__(self) -> None:
        self.lines: list[list[str]] = [[]]
        self.row = self.column = 0

    def feed(self, text: str) -> None:
        """Show more output."""
        for token in _TOKEN.finditer(text):
            if token[2]:
                self._control(token[2], int(token[1].partition(";")[0] or 1), token[1])
            elif not token[0].startswith("\x1b"):
                self._put(token[0])

    def _put(self, character: str) -> None:
        if character == "\n":
            self._go(self.row + 1)
        elif character == "\r":
            self.column = 0
        elif character == "\b":
            self.column = max(0, self.column - 1)
        elif character.isprintable():
            if self.column == COLUMNS:
                self._go(self.row + 1)
                self.column = 0
            line = self.lines[self.row]
            line += " " * (self.column + 1 - len(line))
            line[self.column] = character
            self.column += 1

    def _control(self, kind: str, number: int, given: str) -> None:
        if kind in "AB":
            self._go(max(0, self.row + (number if kind == "B" else -number)))
        elif kind in "CD":
            self.column = min(COLUMNS - 1, max(0, self.column + (number if kind == "C" else -number)))
        elif kind == "G":
            self.column = number - 1
        elif kind == "K":
            self.lines[self.row] = [] if given == "2" else self.lines[self.row][: self.column]
        elif kind == "J":
            del self.lines[self.row + 1 :]

    def _go(self, row: int) -> None:
        self.lines += [[] for _ in range(row + 1 - len(self.lines))]
        self.row = row

    def text(self) -> list[str]:
        """Return the lines, without what is empty at the end."""
        shown = ["".join(line).rstrip() for line in self.lines]
        while shown and not shown[-1]:
            shown.pop()
        return shown


def recorded(command: str, folder: Path) -> tuple[list[str], dict[float, list[str]], float, float]:
    """Run a command on a terminal of its own.

    Returns:
        The lines it leaves, the lines that were shown and did not stay by the seconds when they were seen, the seconds until the first
        character, and those until the end.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR", "CI")}
    screen, seen, begin, first = Screen(), dict[float, list[str]](), time.monotonic(), 0.0
    program = subprocess.Popen(
        command,
        shell=True,
        cwd=folder,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment | {"PATH": search, "TERM": "xterm-256color"},
    )
    os.close(theirs)
    looked, unread = begin, b""
    while True:
        now = time.monotonic()
        if now - looked >= _LOOK:
            looked = now
            seen[now - begin] = screen.text()
        if not select.select([ours], [], [], _LOOK)[0]:
            continue
        try:
            unread += os.read(ours, 65536)
        except OSError:  # the other end was closed
            break
        first = first or time.monotonic() - begin
        text = unread.decode(errors="ignore").replace(str(Path.home()), "~")
        whole = text.rpartition("\x1b")[0] if re.search(r"\x1b[^@-~]*$|\x1b\[[?\d;]*$", text) else text
        screen.feed(whole)
        unread = text[len(whole) :].encode()
    program.wait()
    os.close(ours)
    left = screen.text()
    return (
        left,
        {second: [line for line in lines if line and line not in left] for second, lines in seen.items()},
        first,
        time.monotonic() - begin,
    )


def waits(passing: dict[float, list[str]]) -> list[tuple[float, str]]:
    """Pick from what passed a line of each phase that was shown for more than two seconds, from its middle."""
    phases: dict[str, list[tuple[float, str]]] = {}
    for second, lines in passing.items():
        for line in lines:
            phases.setdefault(re.split(r"\s{2}|\d", line)[0], []).append((second, line))
    long = [shown for shown in phases.values() if shown[-1][0] - shown[0][0] > _WAIT]
    return sorted(shown[len(shown) // 2] for shown in long)


def page(parts: Sequence[str]) -> str:
    """Write the page around the recorded commands."""
    return "\n".join(
        (
            "# A session",
            "",
            "From a model to its distilled student, on a terminal of 80 columns, on two CPU cores; `make session` records it again. What",
            "is shown while one waits passes; here some of it follows the lines that stay.",
            "",
            *parts,
        )
    )


def part(about: str, command: str, folder: Path) -> str:
    """Record a command, and write it down."""
    left, passing, first, whole = recorded(command, folder)
    print(f"first character after {first:.1f} s, done after {whole:.0f} s", flush=True)
    shown = "\n".join(line.replace(str(folder), ".") for line in left)
    passed = "".join(f"{line}\n" for _, line in waits(passing))
    block = f"```console\n$ {command}\n{shown}\n```\n"
    while_waiting = f"\nWhile it ran:\n\n```text\n{passed}```\n" if passed else ""
    title = " ".join(command.split()[:2])
    return f"## `{title}`\n\n{about}\n\n{block}{while_waiting}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "prompts.txt").write_text(f"{_CAPTION}\n")
        parts = []
        for about, command in SESSION:
            print(f"$ {command}", flush=True)
            parts.append(part(about, command, folder))
    output.write_text(page(parts))


if __name__ == "__main__":
    main()
