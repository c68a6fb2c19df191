"""What the user sees of a distillation on the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from edit_compile.distillation.dry_run import Estimate
from edit_compile.distillation.ranking.measure import Progress as RankingProgress
from edit_compile.distillation.ranking.ranking import Ranking
from edit_compile.distillation.ranking.tables import TextTable, sets_table, sites_table, title, untaken
from edit_compile.distillation.recipe.schedule import total_steps
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.distillation.run import Result
from edit_compile.distillation.train.losses import loss_names
from edit_compile.distillation.train.metrics import MetricsRow
from edit_compile.report.tables import format_si, plan_summary


def _console(**options: Any) -> Console:
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, **options)


@contextmanager
def show_progress(recipe: Recipe, *, quiet: bool) -> Iterator[Callable[[MetricsRow], None]]:
    """Yield a callback for metric rows: a live bar on a terminal, a line per row elsewhere, nothing if quiet."""
    if quiet or not sys.stderr.isatty():
        yield (lambda row: None) if quiet else (lambda row: print(line_of(row), file=sys.stderr, flush=True))
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("measuring", total=total_steps(recipe), losses="")
        yield lambda row: bar.update(task, completed=row["total"], description=row["phase"], losses=losses_of(row))


def line_of(row: MetricsRow) -> str:
    """Format a row of metrics."""
    return f"{row['phase']}  step {row['step']}/{row['steps']}  {losses_of(row)}"


def losses_of(row: MetricsRow) -> str:
    """Format the losses and the speed of a row."""
    losses = [f"{name} {row[name]:.5f}" for name in ("loss", *loss_names()) if name in row]
    skipped = [f"{row['skipped']} skipped"] if row["skipped"] else []
    return "  ".join([*losses, *skipped, f"lr {row['lr']:.1e}", f"{row['samples_per_second']:.1f} samples/s"])


def print_result(result: Result, as_json: bool) -> None:
    """Print the errors before and after, and where the student is."""
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    before, after = result.before, result.after
    bins = "  ".join(f"{b.timesteps}: {b.error:.4f}" for b in after.bins)
    console = _console()
    console.print(f"validation error {before.total:.4f} -> {after.total:.4f} on {after.samples} samples; by timestep {bins}")
    for size, error in after.resolutions.items():
        console.print(f"at {size} px {before.resolutions[size]:.4f} -> {error:.4f}")
    for speed in result.speeds:
        ratio = f"{1000 * speed.teacher:.1f} ms teacher, {1000 * speed.student:.1f} ms student"
        console.print(f"one forward at {speed.size} px: {ratio}")
    console.print(f"{result.seconds:.0f} s of training; the student is in {result.folder}")


@contextmanager
def show_ranking(*, quiet: bool) -> Iterator[Callable[[RankingProgress], None]]:
    """Yield a callback for the parts of a ranking: a live bar on a terminal, now and then a line elsewhere, nothing if quiet."""
    if quiet or not sys.stderr.isatty():
        yield (lambda at: None) if quiet else _print_part
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, TaskID] = {}

        def update(at: RankingProgress) -> None:
            if at.what not in tasks:
                tasks[at.what] = bar.add_task(at.what, total=at.total, loss="")
            bar.update(tasks[at.what], completed=at.done, total=at.total, loss="" if at.loss is None else f"loss {at.loss:.5f}")

        yield update


def _print_part(at: RankingProgress) -> None:
    """Print the last of every tenth of a part."""
    if at.done * 10 // at.total != (at.done - 1) * 10 // at.total:
        loss = "" if at.loss is None else f"  loss {at.loss:.5f}"
        print(f"{at.what}  {at.done}/{at.total}{loss}", file=sys.stderr, flush=True)


def print_ranking(ranking: Ranking, folder: Path, as_json: bool) -> None:
    """Print the sites with their errors and savings, the sets that were measured, and where the ranking is."""
    if as_json:
        print(ranking.to_json())
        return
    console = _console()
    console.print(title(ranking), style="bold")
    console.print("error with one site converted, for what it saves of the FLOPs:", markup=False)
    console.print(_rich_table(sites_table(ranking)))
    for line in untaken(ranking):
        console.print(line, markup=False)
    if ranking.checked:
        console.print(_rich_table(sets_table(ranking)))
    console.print(
        f"the ranking is in {folder}; in a recipe: convert: {{ranking: {folder}/ranking.json, sites: flops <= 0.8x}}", markup=False
    )


def _rich_table(found: TextTable) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for number, name in enumerate(found.head):
        table.add_column(name, justify="right" if number in found.right else "left")
    for row in found.rows:
        table.add_row(*map(escape, row))
    return table


def print_estimate(estimate: Estimate, as_json: bool) -> None:
    """Print the resolved recipe, the plan, and the numbers."""
    if as_json:
        print(json.dumps({**estimate.to_dict(), "plan": plan_summary(estimate.plan)}, indent=2))
        return
    console = _console()
    console.print(yaml.safe_dump(estimate.recipe.model_dump(mode="json"), sort_keys=False), markup=False)
    console.print(estimate.plan)
    console.print(f"{estimate.trained:,} of {estimate.parameters:,} parameters are trained")
    kept = f"{_gibibytes(estimate.state_bytes)} for weights, gradients, optimizer and moving average"
    console.print(f"{kept}; with activations, at the peak of a step in one process:")
    console.print(_phases_table(estimate))
    for name, reason in estimate.errors.items():
        console.print(f"{name}: not estimated: {reason}", markup=False)
    speed = f"{format_si(round(estimate.flops_per_second))}FLOP/s"
    console.print(f"The time assumes the speed of a large matrix product on this machine ({speed}) throughout; real steps take longer.")


def _phases_table(estimate: Estimate) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("phase", "pixels", "steps", "samples per step", "per forward", "FLOPs per step", "memory", "time at least"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase in estimate.phases:
        counts = (f"{phase.steps:,}", f"{phase.samples:,}", f"{phase.micro_batch:,}", format_si(phase.flops), _gibibytes(phase.bytes))
        table.add_row(phase.name, phase.size, *counts, _duration(estimate.least_seconds(phase)))
    return table


def _gibibytes(number: int) -> str:
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.0f} MiB"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"
