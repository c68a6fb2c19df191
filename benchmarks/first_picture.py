"""How long the first picture takes: teacher and student, each in processes of its own with empty caches of torch.compile, in turns.

    python benchmarks/first_picture.py --write benchmarks/results/DATE-first-picture.md
    python benchmarks/first_picture.py --whole --runs 1      # a picture of twenty steps by whole models
    python benchmarks/first_picture.py --only demo/dit --runs 1

For an idle machine. The student is saved first. Timed are reading the student, the first forward of compiled blocks, and first forwards
at five other sizes, or of whole models the other steps; graphs are those of torch.compile. Full-width structures are cut to one block of
each kind unless they are whole. All weights are random.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from edit_compile.files import write_text
from edit_compile.report.markdown import markdown_table

MODELS = {  # blocks of each kind, and pixels a side: the first, and the others
    "demo/dit": (None, (32, 48, 64, 80, 96, 128)),
    "arch/pixart-sigma": (1, (512, 448, 576, 640, 704, 768)),
    "arch/sd3.5-medium": (1, (512, 448, 576, 640, 704, 768)),
}
STEPS = 20  # of a picture
HEAD = ("model", "", "read", "first forward", "{others}", "together", "of the teacher's", "graphs")


def sizes_of(name: str, whole: bool) -> tuple[int | None, tuple[int, ...]]:
    """Return the blocks of each kind, and the sides of the images of all forwards in pixels."""
    blocks, sides = MODELS[name]
    return (None, STEPS * sides[:1]) if whole else (blocks, sides)


def child(name: str, folder: str, student: bool, whole: bool) -> dict[str, Any]:
    """Time what one process does until it has drawn at all sizes."""
    import edit_compile as ec
    from edit_compile.adapters.inputs import inputs_for_size
    from edit_compile.adapters.random_model import random_model
    from edit_compile.api import block_options, repeated_blocks

    blocks, sides = sizes_of(name, whole)
    dtype = torch.float32 if name.startswith("demo/") else torch.bfloat16
    model = random_model(name, blocks=blocks, dtype=dtype).model
    start = time.perf_counter()
    loaded = ec.load(folder, model)
    read = time.perf_counter() - start if student else 0.0
    compiled = loaded if student else model
    for path in repeated_blocks(loaded):  # as ec.compile does, which takes students alone
        compiled.get_submodule(path).compile(**block_options())
    seconds = []
    for side in sides:
        inputs = inputs_for_size(model, side, side, device=torch.device("cpu"), dtype=dtype).inputs
        start = time.perf_counter()
        with torch.no_grad():
            compiled(**inputs)
        seconds.append(time.perf_counter() - start)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {"read": read, "first": seconds[0], "others": sum(seconds[1:]), "graphs": graphs}


def run(name: str, folder: Path, student: bool, whole: bool) -> dict[str, Any]:
    """Run a process with empty caches."""
    with tempfile.TemporaryDirectory() as caches:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches, "TRITON_CACHE_DIR": caches}
        command = [sys.executable, __file__, "--child", name, str(folder), str(int(student)), str(int(whole))]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="a Markdown file to write")
    parser.add_argument("--only", action="append", choices=list(MODELS), help="a model; repeatable; default: all")
    parser.add_argument("--runs", type=int, default=3, help="processes of each kind")
    parser.add_argument("--whole", action="store_true", help=f"whole models, and {STEPS} forwards of one size")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, folder, student, whole = arguments.child
        print(json.dumps(child(name, folder, student == "1", whole == "1")))
        return
    import edit_compile as ec
    from edit_compile.adapters.random_model import random_model

    table = []
    for name in arguments.only or [name for name in MODELS if not (arguments.whole and name.startswith("demo/"))]:
        with tempfile.TemporaryDirectory() as folder:
            blocks, _ = sizes_of(name, arguments.whole)
            saved = Path(folder) / "student"
            made = random_model(name, blocks=blocks, dtype=torch.float32 if name.startswith("demo/") else torch.bfloat16)
            ec.save(ec.linearize(made.model), saved, base=name)
            pairs = [[run(name, saved, student, arguments.whole) for student in (False, True)] for _ in range(arguments.runs)]
        totals = [[sum(each[part] for part in ("read", "first", "others")) for each in pair] for pair in pairs]
        ratio = statistics.median(student / teacher for teacher, student in totals)
        for number, kind in enumerate(("teacher", "student")):
            parts = [f"{statistics.median(pair[number][part] for pair in pairs):.1f} s" for part in ("read", "first", "others")]
            together = f"{statistics.median(total[number] for total in totals):.1f} s"
            table.append((name, kind, *parts, together, f"{ratio:.2f}x" if number else "", str(pairs[0][number]["graphs"])))
            print(*table[-1], sep=" | ", flush=True)
    if arguments.write is not None:
        where = f"torch {torch.__version__}, {os.cpu_count()} cores, {platform.machine()}, load average {os.getloadavg()[0]:.1f} at the end"
        note = f"Medians of {arguments.runs} processes each, in turns; {where}; {time.strftime('%Y-%m-%d')}."
        others = f"{STEPS - 1} more of that size" if arguments.whole else "five other sizes"
        head = [each.format(others=others) for each in HEAD]
        command = f"`python benchmarks/first_picture.py{' --whole' if arguments.whole else ''}`"
        parts = ("# The first picture", command, note, markdown_table(head, table))
        write_text(arguments.write, "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
