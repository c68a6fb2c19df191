"""Runs what is left of a step, unit by unit, in the process that the scheduler began for it."""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import time
import traceback
from pathlib import Path

from benchmarks.gpu.results import Results
from benchmarks.gpu.step import Failed, NotDone, Step, Work
from benchmarks.gpu.steps import STEPS

BROKEN = 75  # the exit status of a process whose device answers no more: the scheduler begins another
_SHORTEST_UNIT = 20.0  # seconds


def run_units(step: Step, results: Results, work: Work) -> bool:
    """Run the units that are left, while there is time; return whether the device still answers."""
    for unit in step.units(work.tiny):
        if results.state(step.name, unit.name).ended is not None:
            continue
        if work.seconds_left < _SHORTEST_UNIT:
            break
        _forget(work)
        results.add("begin", step.name, unit.name)
        began, rows, error = time.monotonic(), [], None
        try:
            rows = unit.run(work)
        except NotDone as reason:
            results.add("further", step.name, unit.name)
            print(f"{step.name}, {unit.name}: {reason}", flush=True)
            break
        except Exception as raised:
            traceback.print_exc()
            rows = raised.rows if isinstance(raised, Failed) else []
            error = f"{type(raised).__name__}: {' '.join(str(raised).split())[:500]}"
        results.add("end", step.name, unit.name, seconds=round(time.monotonic() - began, 1), rows=rows, error=error)
        for row in rows:
            print(f"{step.name}: {', '.join(f'{name} {value}' for name, value in row.items() if value is not None)}", flush=True)
        if error is not None:
            print(f"{step.name}, {unit.name}: {error}", flush=True)
        if not _device_answers(work):
            return False
    return True


def _forget(work: Work) -> None:
    """Give back a GPU's memory of what nothing refers to any more, as models, which refer to themselves: the next unit may need all."""
    import torch

    if work.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _device_answers(work: Work) -> bool:
    """Say whether the device still computes: after an illegal access it never does again in the same process."""
    import torch

    if work.device.type != "cuda":
        return True
    try:
        _forget(work)
        return bool((torch.ones(8, device="cuda") * 2).sum().item() == 16)
    except RuntimeError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("step")
    parser.add_argument("out", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # at the next line of Python
    step = next(step for step in STEPS if step.name == given.step)
    folder = given.work / step.name.partition("-")[0]
    folder.mkdir(parents=True, exist_ok=True)
    work = Work(given.out, folder, given.tiny, time.monotonic() + given.seconds)
    return 0 if run_units(step, Results(given.out), work) else BROKEN


if __name__ == "__main__":
    sys.exit(main())
