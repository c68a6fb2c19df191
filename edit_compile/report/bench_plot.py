"""A plot of a bench."""

from __future__ import annotations

from pathlib import Path

from edit_compile.bench.run import BenchReport
from edit_compile.bench.subjects import BOUND
from edit_compile.errors import ConfigError


def check_plot(path: Path) -> None:
    """Refuse a file that cannot be a plot, before anything is timed.

    Raises:
        ConfigError: its ending is none that matplotlib writes.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ConfigError(f"{path}: plots are written as .{', .'.join(sorted(known))}, not as {path.suffix or 'a file without an ending'}")


def plot_bench(report: BenchReport, path: Path) -> None:
    """Plot seconds of a forward over image tokens, with quartiles, both axes logarithmic; floors are dotted, the bound is dashed.

    Raises:
        ConfigError: as `check_plot`.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(row.name for row in report.rows):
        timed = [(row.tokens, row.seconds) for row in report.rows if row.name == name and row.seconds is not None]
        if not timed:
            continue
        tokens, seconds = zip(*sorted(timed, key=lambda point: point[0]), strict=True)
        medians = [each.median for each in seconds]
        (line,) = axes.plot(tokens, medians, "--o" if name == BOUND else "-o", markersize=4, label=name)
        axes.fill_between(tokens, [each.low for each in seconds], [each.high for each in seconds], color=line.get_color(), alpha=0.2)
        floors = sorted((row.tokens, row.floor.median) for row in report.rows if row.name == name and row.floor is not None)
        if floors:
            axes.plot(*zip(*floors, strict=True), ":", color=line.get_color(), label=f"{name}: floor")
    cut = f", {report.blocks} of each kind of block" if report.blocks is not None else ""
    title = f"{report.model}{cut}, {report.dtype}{', compiled' if report.compiled else ''}\n{report.machine}"
    axes.set(xscale="log", yscale="log", xlabel="image tokens", ylabel="seconds of a forward")
    axes.set_title(title, fontsize="small")
    axes.grid(which="both", alpha=0.2)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
