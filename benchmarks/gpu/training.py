"""A training step at full size, of random weights: seconds, and memory at the peak beside what a dry run counts."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

from benchmarks.gpu.step import Row, Unit, Work, in_gib, in_ms, problem_in, short


def _stage(train: str, resolution: int, batch: int) -> list[str]:
    sizes = {"resolution": resolution, "global_batch_size": batch, "micro_batch_size": batch}
    return [f"train={train}", *(f"stages.0.{name}={size}" for name, size in sizes.items())]


CASES: dict[str, dict[str, list[str]]] = {  # of recipes: what is changed in them, by name
    "sd3.5-medium": {
        "lora, 1024 px": _stage("lora", 1024, 1),
        "lora, 512 px": _stage("lora", 512, 4),
        "attention, 1024 px": _stage("attention", 1024, 1),
        "layerwise, 1024 px": ["layerwise.resolution=1024", "layerwise.global_batch_size=1", "layerwise.micro_batch_size=1"],
    },
    "flux-dev": {  # with its optimizer's state all of its attention needs more memory than one device has
        "inserted, 512 px": _stage("inserted", 512, 1),
        "inserted, 1024 px": _stage("inserted", 1024, 1),
    },
}
STEPS, UNCOUNTED = 6, 3  # the first ones compile
_SHORT = (
    *("data={kind: random}", "prediction=rectified-flow", "timesteps=uniform", "log_every=1", "ema_decay=null"),
    *("samples.count=1", "samples.steps=1", "validation.samples=1", "validation.batch_size=1", "validation.timestep_bins=1"),
)


class _Enough(Exception):
    """Ends a run whose steps were timed: what would come then, checkpoints of tens of gigabytes among it, is of no interest."""


def units(name: str, tiny: bool) -> list[Unit]:
    cases = [*CASES[name]]
    return [Unit(case, partial(_training, name, case)) for case in (cases[-2:] if tiny else cases)]


def _training(name: str, case: str, work: Work) -> list[Row]:
    """Distil a few steps of one phase."""
    import shutil

    import torch

    from edit_compile.adapters.random_model import random_model
    from edit_compile.api import linearize
    from edit_compile.distillation import distill
    from edit_compile.distillation.dry_run import dry_run

    recipe, folder = _recipe(name, case, work), work.folder / "run"
    row: Row = {"recipe": name, "case": case, "trained": recipe.train}
    phase = recipe.layerwise or recipe.stages[0]
    row["batch"] = phase.global_batch_size
    (estimate,) = dry_run(recipe).phases[:1]
    row["counted GiB"] = in_gib(estimate.bytes)
    times: list[float] = []

    def report(metrics: dict[str, Any]) -> None:
        if work.device.type == "cuda":
            torch.cuda.synchronize()
            row["peak GiB"] = in_gib(torch.cuda.max_memory_allocated())
            row["reserved GiB"] = in_gib(torch.cuda.max_memory_reserved())
        times.append(time.perf_counter())
        row["loss"] = short(metrics["loss"])
        if len(times) == STEPS:
            raise _Enough

    with problem_in(row):
        model = random_model(recipe.model, device=work.device.type, dtype=recipe.dtype).model
        student = linearize(model, recipe.convert)
        row["parameters"] = f"{sum(p.numel() for p in student.parameters()) / 1e9:.3g} G"
        if work.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            distill(recipe, folder, overwrite=True, student=student, report=report)
        except _Enough:
            pass
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            torch.compiler.reset()  # with what compiled code keeps
            if len(times) > UNCOUNTED:
                steps = [b - a for a, b in zip(times[UNCOUNTED - 1 :], times[UNCOUNTED:], strict=False)]
                row["ms a step"] = in_ms(statistics.median(steps))
                row["TFLOP/s"] = short(estimate.flops / statistics.median(steps) / 1e12)
    return [row]


def _recipe(name: str, case: str, work: Work) -> Any:
    """Read a recipe, cut to the one phase that the case is about."""
    from edit_compile.distillation import load_recipe

    layerwise = case.startswith("layerwise")
    phase = "layerwise" if layerwise else "stages.0"
    changes = [*CASES[name][case], *_SHORT, f"{phase}.steps={STEPS}", *([] if layerwise else ["layerwise=null"])]
    if work.tiny:
        changes += ["model=demo/mm-dit", "compile=false", f"{phase}.resolution=16"]
    else:
        changes += [f"model=arch/{name}"]
    if layerwise:
        changes += ["stages.0.steps=1", "stages.0.global_batch_size=1", "stages.0.micro_batch_size=1", "stages.0.resolution=512"]
        changes += ["stages.0.resolution=16"] if work.tiny else []
    recipe = load_recipe(name, changes)
    return recipe.model_copy(update={"stages": recipe.stages[:1]})
