"""A plot of a run's losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edit_compile.distillation.train.losses import loss_names
from edit_compile.distillation.train.metrics import MetricsRow


def plot_losses(rows: Sequence[MetricsRow], path: Path) -> None:
    """Plot every loss over the steps of all phases, on a logarithmic axis, every other phase shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in ("loss", *loss_names()):
        points = [(row["total"], row[name]) for row in rows if row.get(name, 0) > 0]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
    begin = 0
    for number, phase in enumerate(dict.fromkeys(row["phase"] for row in rows)):
        end = max(row["total"] for row in rows if row["phase"] == phase)
        axes.axvspan(begin, end, color="0.5", alpha=0.06 + 0.08 * (number % 2), linewidth=0)
        axes.text(begin, 1.01, f" {phase}", transform=axes.get_xaxis_transform(), fontsize="small")
        begin = end
    axes.set(yscale="log", xlabel="step", ylabel="loss", xlim=(0, max(begin, 1)))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
