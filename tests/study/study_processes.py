"""Studies by several processes: killed with SIGKILL again and again, and by two at once; then runs that are there, compared.

A program of its own: `python study_processes.py FOLDER` prints what came out, as JSON. The models are converted once; all processes
are forks.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import sys
from functools import cache
from pathlib import Path

import torch
import yaml
from diffusers import PixArtTransformer2DModel

import toy
from edit_compile.distillation import models, run
from edit_compile.study import compare as comparison
from edit_compile.study.compare import compare, read_results

SIDE, STEPS = 16, 3
SIZES = {"sample_size": SIDE, "patch_size": 2, "in_channels": 3, "out_channels": 3, "num_layers": 1, "norm_num_groups": 4}
HEADS = {"attention_head_dim": 8, "num_attention_heads": 2, "cross_attention_dim": 16, "caption_channels": 12}
KILLED_AT = (3, 7, 12)  # the calls of os.replace that attempts do not survive


def write_study(folder):
    torch.manual_seed(0)
    toy.shaken(PixArtTransformer2DModel(**SIZES, **HEADS, use_additional_conditions=False), amount=0.2).save_pretrained(folder / "model")
    stage = {"resolution": SIDE, "steps": STEPS, "global_batch_size": 1, "warmup_steps": 0, "lr": 1e-3}
    validation = {"samples": 2, "batch_size": 2, "timestep_bins": 1}
    recipe = {"model": str(folder / "model"), "data": {"kind": "random"}, "stages": [stage], "validation": validation, "log_every": 1}
    (folder / "own.yaml").write_text(yaml.safe_dump(recipe))
    configurations = {"one": {"convert.design": "edit"}, "other": {"convert.design": "kv-compress"}}
    measure = {"flops": [SIDE], "gallery": 0}
    study = {"recipe": "own.yaml", "configurations": configurations, "seeds": [0], "measure": measure, "untrained": ["one"]}
    (path := folder / "study.yaml").write_text(yaml.safe_dump(study))
    return path


def convert_once():
    """Let all forks have the same conversions, which take longer than everything else here."""
    real = models.make_student

    @cache
    def made(convert):
        (recipe,) = [recipe for recipe in seen if recipe.convert.model_dump_json() == convert]
        return real(recipe)

    def make(recipe, *, other_data=False, for_shards=False):
        if not any(recipe.convert == other.convert for other in seen):
            seen.append(recipe)
        return copy.deepcopy(made(recipe.convert.model_dump_json()))

    seen = []
    for module in (run, comparison):
        module.make_student = make
    return make


def begin(path, folder, kill_at=None):
    """Do the study in a fork; returns its process id."""
    child = os.fork()
    if child:
        return child
    if kill_at is not None:
        real, calls = os.replace, []

        def replace(*args):
            calls.append(args)
            if len(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args)

        os.replace = replace
    said = []
    compare(path, output=folder, say=said.append)
    with (folder.parent / f"{folder.name}.said").open("a") as file:
        file.write("".join(f"{line}\n" for line in said))
    os._exit(any(" failed: " in line for line in said))


def ended(child):
    """Wait for a fork; returns whether it was not killed."""
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a process failed")
    return os.WIFEXITED(status)


def found(folder):
    """All that must be equal, however a study came about."""
    rows = read_results(folder).rows
    numbers = {row.title: {name: spread.median for name, spread in row.numbers.items() if name != "training.seconds"} for row in rows}
    students = [json.loads((path / "edit_compile.json").read_text())["sha256"] for path in sorted(folder.glob("cells/*/*"))]
    states = [cell.state for row in rows for cell in row.cells]
    return {"numbers": numbers, "students": students, "states": states}


def main(folder):
    path, make = write_study(folder), convert_once()
    study = comparison.load_study(path)
    for name in study.configurations:
        make(comparison.resolve(study, path, name, 0))
    ended(begin(path, folder / "straight"))
    kills = sum(not ended(begin(path, folder / "killed", number)) for number in KILLED_AT)
    ended(begin(path, folder / "killed"))
    for child in [begin(path, folder / "two") for _ in range(2)]:
        ended(child)
    trained = (folder / "two.said").read_text().count(": training\n")
    print(json.dumps({"kills": kills, "trained by two": trained, **{name: found(folder / name) for name in ("straight", "killed", "two")}}))


def main_of_runs(folder):
    """Compare the cells as runs: as they are, and one whose student was replaced by the other's after it was measured."""
    one, other = (folder / "straight" / "cells" / name / "seed-0" for name in ("one", "other"))
    replaced = shutil.copytree(one, folder / "replaced")
    for file in other.iterdir():
        if file.is_file() and file.name != "measured.json":
            shutil.copy(file, replaced)
    rows = compare(other, replaced, output=folder / "comparison").rows[1:]
    print(json.dumps([{name: spread.median for name, spread in row.numbers.items()} for row in rows]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    main_of_runs(Path(sys.argv[1]))
