"""What the user sees of a distillation on the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from rich.markup import escape

from edit_compile.bench.devices import USUAL_SHARE
from edit_compile.distillation.dry_run import Estimate
from edit_compile.distillation.ranking.ranking import Ranking
from edit_compile.distillation.ranking.tables import ABOUT_SETS, TextTable, sets_table, sites_table, title, untaken
from edit_compile.distillation.run import Result
from edit_compile.report.folded_table import FoldedTable
from edit_compile.report.tables import format_si, plan_summary
from edit_compile.report.terminal import make_console
from edit_compile.words import bytes_in_words, duration_in_words


def print_result(result: Result, as_json: bool) -> None:
    """Print the errors before and after, and where the student is."""
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    console = make_console()
    before, after = result.before, result.after
    bins = "  ".join(f"{b.timesteps}: {b.error:.3g}" for b in after.bins)
    images = "" if result.data is None else f" of {result.data.held_out} held-out images"
    console.print(f"validation error {before.total:.3g} -> {after.total:.3g} on {after.samples} samples{images}; by timestep {bins}")
    for size, error in after.resolutions.items():
        console.print(f"at {size} px {before.resolutions[size]:.3g} -> {error:.3g}")
    for speed in result.speeds:
        size, teacher, student, speedup = speed.row
        console.print(f"one forward at {size}: {teacher} ms teacher, {student} ms student, {speedup}")
    console.print(f"{duration_in_words(result.seconds)} of training; the student is in {result.folder}", markup=False)


def print_ranking(ranking: Ranking, folder: Path, as_json: bool) -> None:
    """Print the sites with their errors and savings, the sets that were measured, and where the ranking is."""
    if as_json:
        print(ranking.to_json())
        return
    console = make_console()
    console.print(title(ranking), style="bold", markup=False)
    console.print("error with one site converted, for what it saves of the FLOPs:", markup=False)
    console.print(_rich_table(sites_table(ranking)))
    for line in untaken(ranking):
        console.print(line, markup=False)
    if ranking.checked:
        console.print(_rich_table(sets_table(ranking)))
        console.print(ABOUT_SETS, style="dim")
    console.print(
        f"the ranking is in {folder}; in a recipe: convert: {{ranking: {folder}/ranking.json, sites: {ranking.choices.suggested}}}",
        markup=False,
    )


def _rich_table(found: TextTable) -> FoldedTable:
    left = set(range(len(found.head))) - set(found.right)
    return FoldedTable(found.head, [[escape(cell) for cell in row] for row in found.rows], left)


def print_estimate(estimate: Estimate, as_json: bool) -> None:
    """Print the resolved recipe, the plan, and the numbers."""
    if as_json:
        print(json.dumps({**estimate.to_dict(), "plan": plan_summary(estimate.plan)}, indent=2))
        return
    console = make_console()
    console.print(yaml.safe_dump(estimate.recipe.model_dump(mode="json"), sort_keys=False), markup=False)
    console.print(estimate.plan)
    console.print(f"{estimate.trained:,} of {estimate.parameters:,} parameters are trained")
    kept = f"{bytes_in_words(estimate.state_bytes)} for weights, gradients, optimizer and moving average"
    where = "in one process" if estimate.devices == 1 else f"on each of {estimate.devices} devices"
    console.print(f"{kept}; with activations, at the peak of a step {where}, as below.")
    console.print("Samples and FLOPs are of a step; times are of the phase.")
    console.print(_phases_table(estimate))
    for name, reason in estimate.errors.items():
        console.print(f"{name}: not estimated: {reason}", markup=False)
    for note in estimate.notes:
        console.print(note, markup=False)
    console.print(_assumptions(estimate))


def _assumptions(estimate: Estimate) -> str:
    speed = f"{format_si(round(estimate.flops_per_second))}FLOP/s"
    if estimate.device is None:
        return f"The time assumes the speed of a large matrix product on this machine ({speed}) throughout; real steps take longer."
    what = "its peak by the data sheet, without the time that devices take to talk to each other"
    return (
        f"{estimate.device.name}: {bytes_in_words(estimate.device.bytes)} a device. The least time is at {speed}, {what}; "
        f"the usual one at {USUAL_SHARE:.0%} of that."
    )


def _phases_table(estimate: Estimate) -> FoldedTable:
    memory = ["memory"] if estimate.devices == 1 else ["memory", "sharded"]
    times = ["at least"] if estimate.device is None else ["least", "usual"]
    rows = []
    for phase in estimate.phases:
        counts = (f"{phase.steps:,}", f"{phase.samples:,}", f"{phase.micro_batch:,}", format_si(phase.flops))
        needed = [_memory(number, estimate) for number in (phase.bytes, phase.sharded_bytes)][: len(memory)]
        least = estimate.least_seconds(phase)
        rows.append([phase.name, phase.size, *counts, *needed, *map(duration_in_words, (least, least / USUAL_SHARE)[: len(times)])])
    return FoldedTable(["phase", "pixels", "steps", "samples", "at once", "FLOPs", *memory, *times], rows)


def _memory(number: int, estimate: Estimate) -> str:
    too_much = estimate.device is not None and number > estimate.device.bytes
    return f"{bytes_in_words(number)} (too much)" if too_much else bytes_in_words(number)
