"""The plot of a ranking: error against FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

from edit_compile.distillation.ranking.ranking import Ranking
from edit_compile.distillation.ranking.tables import title
from edit_compile.files import replacing

_STEPS: dict[str, Any] = {"drawstyle": "steps-pre", "marker": "."}  # a set serves all budgets down to the FLOPs it leaves
Points = Sequence[tuple[float, float]]


def plot_ranking(ranking: Ranking, path: Path) -> None:
    """Plot the predicted error of the best sets against the FLOPs they leave, beside other orders and what was measured."""
    from matplotlib.figure import Figure

    choices = ranking.choices
    ranks = list(choices.best)
    in_model = [site.path for site in ranking.sites if site.path in ranks]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    if ranks:
        _shade(axes, [_shares(points, ranking) for points in choices.shuffled()])
        lines = (("the first n sites", in_model, "C1"), ("the last n sites", in_model[::-1], "C2"))
        for label, paths, colour in lines:
            points = _shares(choices.in_order(paths)[1:], ranking)
            axes.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1, **_STEPS)
        front = [(selection.flops, selection.error) for selection in choices.front()]
        axes.plot(*zip(*_shares(front, ranking), strict=True), label="the best sets, predicted", color="C0", linewidth=2, **_STEPS)
    measured = [(check.flops, check.measured) for check in ranking.checked]
    if measured:
        x, y = zip(*_shares(measured, ranking), strict=True)
        axes.scatter(x, y, label="the best sets, measured", color="C3", marker="x", zorder=3)
    axes.set(xlabel="FLOPs, as a share of the model's", ylabel="relative error of the output, as fitted", title=title(ranking))
    axes.title.set_fontsize("medium")
    axes.invert_xaxis()
    axes.grid(alpha=0.2)
    if axes.get_legend_handles_labels()[0]:
        axes.set_yscale("log")
        axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _shares(points: Points, ranking: Ranking) -> list[tuple[float, float]]:
    return [(flops / ranking.flops, error) for flops, error in points]


def _shade(axes: Any, orders: Sequence[Points]) -> None:
    """Shade between the deciles of random orders, at the mean cost of each number of sites, with a line at their median."""
    middle, low, high, x = [], [], [], []
    for number in range(1, len(orders[0])):
        deciles = quantiles((points[number][1] for points in orders), n=10, method="inclusive")
        low.append(deciles[0])
        middle.append(deciles[4])
        high.append(deciles[8])
        x.append(sum(points[number][0] for points in orders) / len(orders))
    axes.fill_between(x, low, high, step="pre", color="0.5", alpha=0.2, linewidth=0)
    axes.plot(x, middle, label="random sites: median and deciles", color="0.5", linewidth=1, drawstyle="steps-pre")
