"""Kills a run with SIGKILL again and again, also in the middle of saves, until it is through: is the student the same?

A program of its own: `python killed_run.py FOLDER SEED` prints the number of kills and whether all weights are equal.
The model is converted once; every attempt is a fork.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import toy_distill
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.distillation import distill
from edit_compile.distillation.train import checkpoints as state

STEPS = 12
RECIPE = {
    "stages": [{"resolution": [12, 16], "steps": STEPS // 2, "global_batch_size": 2}],
    "layerwise": {"steps": STEPS // 2, "global_batch_size": 2},
    "save_every": 2,
    "keep_last": 1,
    "validation": {"samples": 2, "batch_size": 2, "timestep_bins": 1},
}


class Killing(toy_distill.ToySource):
    """Kills its process when a position is asked for."""

    def __init__(self, position):
        super().__init__()
        self.position = position

    def batch(self, request):
        if request.split == "train" and request.position >= self.position:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(request)


def kill_at_call(module, name, number):
    """Let the `number`-th call of a function be the last thing its process does."""
    real, calls = getattr(module, name), []

    def dies(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(module, name, dies)


def attempt(folder, plan):
    """One run in a fork; returns whether it came through."""
    child = os.fork()
    if child == 0:
        source = Killing(plan.get("position", 10**9))
        if "call" in plan:
            kill_at_call(*plan["call"])
        result = distill(
            toy_distill.recipe(**RECIPE),
            folder,
            resume=True,
            student=toy_distill.student(),
            source=source,
            denoise=toy_distill.denoise,
            schedule=NoiseSchedule("rectified-flow"),
        )
        save_file({k: v.contiguous() for k, v in result.student.state_dict().items()}, folder / "final")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit(f"an attempt failed: {plan}")
    return os.WIFEXITED(status)


def main(folder, seed):
    rng = random.Random(seed)
    toy_distill.student()
    attempt(folder / "straight", {})
    in_saves = [(state, "flush"), (state, "save_file"), (state, "_remove"), (state.os, "replace"), (state.shutil, "rmtree")]
    kills, in_save = 0, 0
    for number in range(40):
        plan = {"position": rng.randrange(0, 2 * STEPS)} if number % 2 else {"call": (*rng.choice(in_saves), rng.randrange(1, 5))}
        if kills >= 8:
            plan = {}
        if attempt(folder / "killed", plan):
            break
        kills, in_save = kills + 1, in_save + ("call" in plan)
    one, other = (load_file(folder / name / "final") for name in ("straight", "killed"))
    equal = one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    print(json.dumps({"kills": kills, "in_save": in_save, "equal": equal}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
