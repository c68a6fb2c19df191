"""What the user sees of a distillation."""

from __future__ import annotations

import json
import sys
from typing import Any

import yaml
from rich.console import Console

from edit_compile.distill.runner import Result
from edit_compile.distill.trial import Trial
from edit_compile.report import PlanTable, plan_summary


def _console(**options: Any) -> Console:
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, **options)


def print_row(row: dict[str, Any]) -> None:
    """A row of metrics as a line on stderr."""
    losses = "  ".join(f"{name} {row[name]:.5f}" for name in ("loss", "task", "output", "feature") if name in row)
    place = f"{row['phase']}  step {row['step']}/{row['steps']}"
    _console(stderr=True).print(f"{place}  {losses}  lr {row['lr']:.1e}  {row['samples_per_second']:.1f} samples/s")


def print_result(result: Result, as_json: bool) -> None:
    """The errors before and after, and where the student is."""
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    before, after = result.before, result.after
    buckets = "  ".join(f"{b.low:.0f}-{b.high:.0f}: {b.error:.4f}" for b in after.buckets)
    console = _console()
    console.print(f"held-out relative error {before.total:.4f} -> {after.total:.4f} on {after.samples} samples; by timestep {buckets}")
    console.print(f"{result.seconds:.0f} s of training; the student is in {result.folder}")


def print_trial(trial: Trial, as_json: bool) -> None:
    """The resolved recipe, the plan, and the numbers."""
    if as_json:
        print(json.dumps({**trial.to_dict(), "plan": plan_summary(trial.plan)}, indent=2))
        return
    console = _console()
    console.print(yaml.safe_dump(trial.recipe.model_dump(mode="json"), sort_keys=False), markup=False)
    console.print(PlanTable(trial.plan))
    console.print(f"{trial.trained:,} of {trial.parameters:,} parameters are trained")
    console.print(f"{trial.state_bytes / 2**20:,.0f} MiB for weights, gradients, optimizer and moving average; activations come on top")
