"""Try to break the commands: kills, signals, full disks, damaged checkpoints, broken recipes and plans, and threads.

    python benchmarks/robustness.py -o rows.jsonl                                   # all, for hours; goes on where it was stopped
    python benchmarks/robustness.py kills checkpoints --count 10 -o rows.jsonl      # some, fewer of each
    python benchmarks/robustness.py -o rows.jsonl --write benchmarks/results/DATE-robustness.md

A trial is a function of its number, runs in a fork with a limit of time, and adds a row to the JSON-lines file. Right is:

- kills: a command (convert, cache, distill, rank) is killed up to three times with SIGKILL, at any moment, and then run to its end: what it
  leaves has the same bits as what it leaves undisturbed, but for times.
- signals: a distillation that gets SIGINT or SIGTERM at any moment ends with the documented status, and `--resume` gives the same bits.
- disks: on a disk that becomes full (of Linux, a tmpfs in a user namespace), an error in one line; with more space, `--resume` gives
  the same bits.
- checkpoints, recipes, plans: whatever bytes or values were changed in a checkpoint's, recipe's or plan's files, it is taken or refused
  with an error of this package, within seconds and a bounded memory, and nothing is executed or downloaded.
- threads: eight threads, each with 200 forwards of student and teacher at four sizes, give what one thread gives; eager and compiled.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attacks.damage import checkpoints, plans, recipes
from attacks.interruptions import DISKS, disks, kills, signals
from attacks.processes import Wrong
from attacks.threads import threads
from attacks.workshop import workshop

import edit_compile as ec

COUNTS = {"kills": 60, "signals": 20, "disks": DISKS, "checkpoints": 1000, "recipes": 300, "plans": 300, "threads": 2}
KINDS = (kills, signals, disks, checkpoints, recipes, plans, threads)
TRIALS: dict[str, Callable[[int, Path], str]] = {each.__name__: each for each in KINDS}


# ------------------------------------------------------------------ rows and the table


def run(kind: str, number: int) -> dict[str, Any]:
    """Run a trial; returns its row."""
    folder = workshop() / f"{kind}-{number}"
    try:
        return {"kind": kind, "number": number, "right": True, "what": TRIALS[kind](number, folder)}
    except Wrong as wrong:
        return {"kind": kind, "number": number, "right": False, "what": str(wrong)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Make a Markdown page of all rows."""
    lines = [
        f"edit_compile {ec.__version__}, torch {torch.__version__}; `benchmarks/robustness.py` says what is tried, and what is right.",
        "",
        "| tried | trials | right |",
        "|---|---|---|",
    ]
    for kind in TRIALS:
        own = [row for row in rows if row["kind"] == kind]
        if own:
            lines.append(f"| {kind} | {len(own)} | {sum(row['right'] for row in own)} |")
    wrong = [row for row in rows if not row["right"]]
    return "\n".join([*lines, "", *(f"- {row['kind']} {row['number']}: {row['what']}" for row in wrong)]).rstrip() + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(TRIALS)}; default: all")
    parser.add_argument(
        "--count", type=int, help="trials of each kind; default: " + ", ".join(f"{count} {kind}" for kind, count in COUNTS.items())
    )
    parser.add_argument("-o", "--rows", type=Path, required=True, help="JSON-lines file of the rows; what is in it is not tried again")
    parser.add_argument("--write", type=Path, help="Markdown file for the table")
    options = parser.parse_args()
    unknown = [kind for kind in options.kinds if kind not in TRIALS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are: {', '.join(TRIALS)}")
    return options


def main_program() -> None:
    torch.set_num_threads(1)
    options = parse()
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.is_file() else []
    known = {(row["kind"], row["number"]) for row in rows}
    try:
        for kind in options.kinds or TRIALS:
            for number in range(options.count or COUNTS[kind]):
                if (kind, number) in known:
                    continue
                rows.append(run(kind, number))
                with options.rows.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print("right" if rows[-1]["right"] else "WRONG", kind, number, rows[-1]["what"], flush=True)
    finally:
        shutil.rmtree(workshop(), ignore_errors=True)
    if options.write is not None:
        options.write.write_text(f"# Attempts to break it\n\n{table(rows)}")
    print(table(rows))


if __name__ == "__main__":
    main_program()
