"""What a distillation step costs beyond its forwards and its backward, and in memory beyond training the student alone.

    python benchmarks/training_step.py -o benchmarks/results/DATE-training-step.md
    python benchmarks/training_step.py sd3.5-medium --steps 10 --set model=arch/sd3.5-medium --set 'data={kind: random}' \\
        --set stages.0.resolution=1024 --set stages.0.global_batch_size=1 --set stages.0.micro_batch_size=1 --set compile=false

Time: the runner's own steps (data, noise, losses, clipping, optimizer, moving average, metrics and all), each followed in the same
process by a bare one: the teacher's forward, the student's forward, a mean squared error and its backward. The ratio of neighbours is
given with its quartiles. Memory: the peak of a run with the recipe's losses against one with the task loss alone, which has no
teacher; weights included. Where there is no GPU that counts, tensors are counted: see `edit_compile.bench.peak_memory`.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

import edit_compile as ec
from edit_compile.adapters.denoise import denoise
from edit_compile.adapters.load_model import load_model
from edit_compile.bench import Timing, peak_memory
from edit_compile.distillation import Recipe, distill, load_recipe
from edit_compile.distillation.data import BatchRequest, open_source

UNCOUNTED = 3  # steps at the beginning
MEASURED = (
    *("prediction=rectified-flow", "layerwise=null", "log_every=1"),
    *("samples.count=1", "samples.steps=1", "validation.samples=1", "validation.timestep_bins=1"),
)
ALONE = "stages.0.losses={task: 1, output: 0, feature: 0}"


@dataclass
class Watch:
    """What `distill` reports to, a row a step: times the steps, and a bare one after each."""

    recipe: Recipe
    student: nn.Module
    steps: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    since: float | None = None

    def __call__(self, row: dict[str, Any]) -> None:
        now = _now()
        if self.since is not None:
            self.steps.append(now - self.since)
        self._bare_step()
        self.since = _now()
        self.bare.append(self.since - now)

    def _bare_step(self) -> None:
        x, times, conditions = self._inputs
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            with torch.no_grad(), ec.teacher(self.student):
                expected = denoise(self.student, x, times, conditions)
            found = denoise(self.student, x, times, conditions)
        F.mse_loss(found.float(), expected.float()).backward()
        for parameter in self.student.parameters():
            parameter.grad = None

    @cached_property
    def _inputs(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        stage, device = self.recipe.stages[0], next(self.student.parameters()).device
        source = open_source(self.recipe.data, self.student, self.recipe.seed)
        batch = source.batch(BatchRequest(0, stage.global_batch_size, range(stage.global_batch_size), *stage.resolution))
        found = (batch.latents, torch.full((stage.global_batch_size,), 500.0), batch.conditions)
        return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, found)


def student_of(recipe: Recipe) -> nn.Module:
    torch.manual_seed(recipe.seed)
    return ec.linearize(load_model(recipe.model, random_weights=True).model, recipe.convert)


def timed(recipe: Recipe, student: nn.Module) -> tuple[Timing, Timing, Timing]:
    """Seconds of a step of the first stage, of a bare one, and their ratio."""
    watch = Watch(recipe, student)
    with tempfile.TemporaryDirectory() as folder:
        distill(recipe, folder, student=watch.student, report=watch)
    pairs = list(zip(watch.steps, watch.bare, strict=False))[UNCOUNTED:]  # a step, and the bare one before it
    steps, bare = zip(*pairs, strict=True)
    return Timing.of(steps), Timing.of(bare), Timing.of([a / b for a, b in pairs])


def memory(recipe: Recipe, student: nn.Module) -> int:
    """Bytes at the peak of a run, weights included."""
    with tempfile.TemporaryDirectory() as folder:

        def run() -> None:
            distill(recipe, folder, overwrite=True, student=student)

        if not torch.cuda.is_available():
            return sum(p.numel() * p.element_size() for p in student.parameters()) + peak_memory(run, "cpu")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def report(name: str, changes: list[str], steps: int) -> str:
    """Markdown of both measurements."""

    def recipe(*more: str) -> Recipe:
        made = load_recipe(name, [*changes, *MEASURED, *more])
        return made.model_copy(update={"stages": made.stages[:1]})

    student = student_of(recipe())
    step, bare, ratio = timed(recipe(f"stages.0.steps={steps + UNCOUNTED + 1}"), copy.deepcopy(student))
    peaks = [memory(recipe("stages.0.steps=2", *losses), copy.deepcopy(student)) for losses in ((), (ALONE,))]
    run, where = recipe(), torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    stage = run.stages[0]
    command = " ".join(["benchmarks/training_step.py", name, *(f"--set '{change}'" for change in changes)])
    rows = {
        "seconds of a step": (step.median, step.low, step.high),
        "seconds of teacher forward, student forward and backward": (bare.median, bare.low, bare.high),
        "ratio": (ratio.median, ratio.low, ratio.high),
    }
    lines = [
        f"`{command}`, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {where}, load average {os.getloadavg()[0]:.1f} on "
        f"{os.cpu_count()} cores at the end; {run.model} at {stage.resolution[0]} x {stage.resolution[1]} px, "
        f"batch {stage.global_batch_size}, {run.precision}, train: {run.train}, {steps} steps.",
        "",
        "| time | median | quartiles |",
        "|---|---|---|",
        *(f"| {what} | {middle:.4g} | {low:.4g} to {high:.4g} |" for what, (middle, low, high) in rows.items()),
        "",
        "| memory at the peak | MiB |",
        "|---|---|",
        f"| the recipe's losses | {peaks[0] / 2**20:,.1f} |",
        f"| the student alone (task loss) | {peaks[1] / 2**20:,.1f} |",
        f"| ratio | {peaks[0] / peaks[1]:.3f} |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="demo-mm-dit", help="a YAML file or a shipped recipe's name")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    parser.add_argument("--steps", type=int, default=40, help="timed ones")
    parser.add_argument("-o", "--output", type=Path, help="Markdown file to write; default: print only")
    arguments = parser.parse_args()
    found = report(arguments.recipe, arguments.changes, arguments.steps)
    print(found)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(f"# What a distillation step costs\n\n{found}")


if __name__ == "__main__":
    main()
