"""All that needs a GPU, in steps that resume.

    benchmarks/gpu.sh OUT                      runs the next unfinished steps, in order, until the minutes are over
    benchmarks/gpu.sh OUT latency-flux-dev     a step of these, what is unfinished of it
    benchmarks/gpu.sh OUT --list               says what is done and what is left
    benchmarks/gpu.sh OUT --tiny               a rehearsal of all on the CPU, at small sizes

Rows are in OUT/results.jsonl as soon as they are measured, and in OUT/results.md at the end. A step is a process of its own, which is
stopped when its time is over and goes on in the next run; what fails is written down, and the next step begins.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu import versions
from benchmarks.gpu.results import Results, in_words, page
from benchmarks.gpu.step import Step
from benchmarks.gpu.steps import STEPS

GRACE = 20.0  # seconds that a step has to save what it is doing, once it is asked to end
SHORTEST = 45.0  # seconds; with less than that left no step begins
CRASHES = 3  # of a step's process in one run


def main(arguments: list[str] | None = None) -> int:
    """Run steps; return 0 if all is done, 3 if something is left, 1 if something failed, 2 if nothing can run here."""
    parser = argparse.ArgumentParser("benchmarks/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder for results: few, small files")
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"default: all, in this order: {', '.join(step.name for step in STEPS)}")
    parser.add_argument("--minutes", type=float, default=9, help="after which this run ends; default: %(default)s")
    parser.add_argument("--work", type=Path, help="a folder for checkpoints and compiled code; default: OUT/work")
    parser.add_argument("--tiny", action="store_true", help="rehearse")
    parser.add_argument("--again", action="store_true", help="forget what was found of the steps that are named")
    parser.add_argument("--list", action="store_true", dest="lists", help="say what is done, and run nothing")
    given = parser.parse_args(arguments)
    known = {step.name: step for step in STEPS}
    if unknown := [name for name in given.steps if name not in known]:
        parser.error(f"there is no step {unknown[0]!r}; there are: {', '.join(known)}")
    until = time.monotonic() + 60 * given.minutes
    results = Results(given.out)
    chosen = [known[name] for name in given.steps] or list(STEPS)
    if given.lists:
        print(*(in_words(step, results, given.tiny) for step in chosen), sep="\n")
        return 0
    lines = versions.found()
    print(*lines, "", sep="\n", flush=True)
    if lacking := versions.missing():
        print(f"missing: {', '.join(lacking)}. Put their wheels into a folder and name it: WHEELS=FOLDER benchmarks/gpu.sh ...")
        return 2
    if any(event["tiny"] != given.tiny for event in results.events() if event["event"] == "run"):
        print(f"{given.out} has {'measurements' if given.tiny else 'a rehearsal'}: name another folder")
        return 2
    results.add("run", tiny=given.tiny, versions=lines)
    if given.again:
        for name in given.steps:
            results.add("again", name)
    work = (given.work or given.out / "work").resolve()
    for step in chosen:
        _run_step(step, results, given.out.resolve(), work, given.tiny, until)
        (given.out / "results.md").write_text(page(STEPS, results, given.tiny, lines))
    print("", *(in_words(step, results, given.tiny) for step in STEPS), sep="\n")
    if any(results.left(step, given.tiny) for step in chosen):
        return 3
    return 1 if any(results.failed(step, given.tiny) for step in chosen) else 0


def _run_step(step: Step, results: Results, out: Path, work: Path, tiny: bool, until: float) -> None:
    """Run what is left of a step, as long as there is time."""
    for _ in range(CRASHES):
        results.give_up(step, tiny)
        seconds = min(60 * step.minutes, until - time.monotonic())
        if not results.left(step, tiny) or seconds < SHORTEST:
            return
        print(f"--- {step.name}: {', '.join(results.left(step, tiny))}; {seconds:.0f} seconds at most", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu.worker", step.name, str(out), str(work), f"{seconds - GRACE:.0f}"]
        process = subprocess.Popen([*command, *(["--tiny"] if tiny else [])], env=_environment(work), start_new_session=True)
        try:
            over = _wait(process, seconds)
        finally:
            _end(process.pid)
            process.wait()
        results.read()
        if over or process.returncode == 0:
            return
        print(f"{step.name}: its process ended with {process.returncode}", flush=True)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for a process; ask it to end when its time is over, and return whether it was."""
    try:
        process.wait(seconds - GRACE / 2)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE / 2)
    return True


def _end(group: int) -> None:
    """End what a step's process has left: compilers, and processes that draw."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _environment(work: Path) -> dict[str, str]:
    """Keep compiled code for the next run, and away from the user's own; ask no hub."""
    folders = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "XDG_CACHE_HOME": "cache"}
    made = {name: str(work / folder) for name, folder in folders.items()}
    fixed = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    fixed |= {"TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}  # which does not know what softmax kernel was preferred: it would give out another one
    return {**made, "PYTORCH_ALLOC_CONF": "expandable_segments:True", **os.environ, **fixed}


if __name__ == "__main__":
    sys.exit(main())
