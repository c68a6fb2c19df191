"""Plots of a run: its losses, and how fast teacher and student are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edit_compile.distillation.evaluate.speed import Speed
from edit_compile.distillation.recipe.schedule import phases_of
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.distillation.train.losses import loss_names
from edit_compile.distillation.train.metrics import MetricsRow

_HALF_LIFE = 0.02  # of the smoothing, as a share of the run's steps
Point = tuple[int, float]


def plot_losses(rows: Sequence[MetricsRow], recipe: Recipe, errors: tuple[float, float], path: Path) -> None:
    """Plot what is minimised over the steps of all phases, on a logarithmic axis: faint as it is, and smoothed within each phase.

    The parts of the loss are plotted with their weights, so that they add up to it.

    Args:
        errors: of validation, before and after training.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    last = max((row["total"] for row in rows), default=1)
    for number, name in enumerate(("loss", *loss_names())):
        label: str | None = name
        for points in _points_by_phase(rows, recipe, name):
            style: dict[str, Any] = {"color": f"C{number}"}
            axes.plot(*zip(*points, strict=True), alpha=0.25, linewidth=0.8, **style)
            axes.plot(*zip(*_smoothed(points, last * _HALF_LIFE), strict=True), linewidth=1.6, label=label, **style)
            label = None
    if all(error > 0 for error in errors):
        axes.plot((0, last), errors, "kD:", linewidth=0.8, markersize=5, label="validation error", clip_on=False, zorder=3)
    begin = 0
    for number, phase in enumerate(dict.fromkeys(row.get("phase", "") for row in rows)):
        end = max(row["total"] for row in rows if row.get("phase", "") == phase)
        axes.axvspan(begin, end, color="0.5", alpha=0.06 + 0.08 * (number % 2), linewidth=0)
        axes.text(begin, 1.01, f" {phase}", transform=axes.get_xaxis_transform(), fontsize="small")
        begin = end
    axes.set(yscale="log", xlabel="step", ylabel="loss, its parts weighted", xlim=(0, last))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def plot_speeds(speeds: Sequence[Speed], path: Any) -> None:
    """Plot the milliseconds of a forward of teacher and student over resolutions, with the speed-up above, to a file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes, numbers = figure.add_subplot(), range(len(speeds))
    for name, color in (("teacher", "0.5"), ("student", "C0")):
        axes.plot(numbers, [1000 * getattr(speed, name) for speed in speeds], "o-", label=name, color=color)
    for number, speed in zip(numbers, speeds, strict=True):
        top = 1000 * max(speed.teacher, speed.student)
        axes.annotate(f"{speed.teacher / speed.student:.2f}x", (number, top), (0, 6), textcoords="offset points", ha="center")
    axes.set_xticks(numbers, [speed.size for speed in speeds])
    axes.set(yscale="log", ylabel="ms per forward")
    axes.margins(x=0.3 / len(speeds), y=0.2)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, format="png")


def _points_by_phase(rows: Sequence[MetricsRow], recipe: Recipe, name: str) -> Iterator[list[Point]]:
    weights: Mapping[str, Mapping[str, float]] = {phase.name: phase.losses or {} for phase in phases_of(recipe)}
    for phase in dict.fromkeys(row.get("phase", "") for row in rows):
        weight = weights.get(phase, {}).get(name, 1.0)
        found = [(row["total"], weight * row[name]) for row in rows if row.get("phase", "") == phase and row.get(name, 0) > 0]
        if found and weight > 0:
            yield found


def _smoothed(points: Sequence[Point], half_life: float) -> list[Point]:
    """Average points exponentially, each weighing half as much after so many steps; the first ones are not favoured."""
    total = weight = 0.0
    before, found = points[0][0], []
    for step, value in points:
        decay = 0.5 ** ((step - before) / half_life)
        total, weight, before = total * decay + value, weight * decay + 1, step
        found.append((step, total / weight))
    return found
