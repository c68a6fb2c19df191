"""A ranking as tables of texts: for the terminal, and as Markdown."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from edit_compile.bench import size_in_words
from edit_compile.distillation.ranking.ranking import Measure, Ranking
from edit_compile.report.markdown import markdown_table
from edit_compile.report.tables import format_si
from edit_compile.words import two_digits

ABOUT_SETS = (
    "Predicted is the sum of the errors of a set's sites; measured is the error with all of them converted, as fitted, before any training "
    "end to end. The sum leaves out what sites do to each other: of large sets it is too low."
)


@dataclass(frozen=True)
class TextTable:
    """A table of texts.

    Attributes:
        right: the columns that are aligned to the right.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[int, ...] = ()


def title(ranking: Ranking) -> str:
    """Say what was ranked, and at which size."""
    tokens = f"{ranking.image_tokens:,} image tokens"
    time = "" if ranking.seconds is None else f", {1000 * ranking.seconds:,.1f} ms"
    return f"{ranking.model} at {size_in_words(ranking.size)} px, {tokens}: {format_si(ranking.flops)}FLOPs{time} as it is"


def sites_table(ranking: Ranking) -> TextTable:
    """List the sites, the best first: for each candidate the error with this site alone converted, and the share of FLOPs it saves."""
    ranks = list(ranking.choices.best)
    measured = {site.path: site.measures for site in ranking.sites if site.measures}
    order = [*ranks, *(path for path in measured if path not in ranks)]
    names = [str(candidate) for candidate in ranking.candidates]
    rows = []
    for number, path in enumerate(order):
        by_candidate = {measure.candidate: measure for measure in measured[path]}
        cells = [_cell(by_candidate.get(n), ranking, best=ranking.choices.best.get(path)) for n in range(len(names))]
        rows.append((str(number + 1) if path in ranks else "-", path, *cells))
    return TextTable(("rank", "site", *names), tuple(rows), (0,))


def _cell(measure: Measure | None, ranking: Ranking, best: object) -> str:
    if measure is None:
        return "-"
    saved = f"{two_digits(100 * measure.saved_flops / ranking.flops)}%"
    time = "" if measure.saved_seconds is None else f", {two_digits(1000 * measure.saved_seconds)} ms"
    star = " *" if measure is best and len(ranking.candidates) > 1 else ""
    return f"{measure.error:.2g} for {saved}{time}{star}"


def sets_table(ranking: Ranking) -> TextTable:
    """List the sets that were converted as a whole: the sum of their sites' errors, and the error that was measured."""
    sites = len([site for site in ranking.sites if site.measures])
    rows = [
        (
            check.sites,
            f"{len(check.converted)} of {sites}",
            f"{check.flops / ranking.flops:.3f}x",
            f"{check.predicted:.3g}",
            f"{check.measured:.3g}",
        )
        for check in ranking.checked
    ]
    return TextTable(("budget", "sites", "FLOPs", "error predicted", "error measured"), tuple(rows), (1, 2, 3, 4))


def orders_table(ranking: Ranking) -> TextTable:
    """Compare the best sets with the first, the last and random sites, by the sums of their errors, at the same number of sites."""
    ranks = list(ranking.choices.best)
    in_model = [site.path for site in ranking.sites if site.path in ranks]
    columns = [ranking.choices.in_order(paths) for paths in (ranks, in_model, in_model[::-1])]
    shuffled = ranking.choices.shuffled()
    rows = []
    for number in range(1, len(ranks) + 1):
        errors = [points[number][1] for points in columns]
        errors.append(sum(points[number][1] for points in shuffled) / len(shuffled))
        rows.append((str(number), f"{columns[0][number][0] / ranking.flops:.3f}x", *(f"{error:.3g}" for error in errors)))
    return TextTable(("sites", "FLOPs of the best", "best", "first", "last", "random, mean"), tuple(rows), tuple(range(6)))


def untaken(ranking: Ranking) -> list[str]:
    """Say which sites no candidate takes, by reason."""
    reasons = Counter(site.reason for site in ranking.sites if not site.measures)
    kept = [f"{number} of {len(ranking.sites)} sites stay as they are: {reason}" for reason, number in reasons.items()]
    brought = [(candidate, name) for candidate in ranking.candidates for name in candidate.brings]
    return [
        *kept,
        *(f"{candidate}: the sites of {name}, which comes with it, are not ranked and stay as they are" for candidate, name in brought),
    ]


def markdown(ranking: Ranking) -> str:
    """Write the ranking as a page."""
    parts = [
        f"# {title(ranking)}",
        "Each cell is the relative error of the model's output with this site alone converted, after a layerwise fit of "
        f"{ranking.recipe['layerwise']['steps']} steps, on {ranking.samples} samples that the fit never saw, and the share of the "
        "model's FLOPs that this saves. Sites are ranked by error for what is saved; * marks a site's best candidate.",
        _markdown(sites_table(ranking)),
        *untaken(ranking),
        f"## Sets\n\n{ABOUT_SETS}",
        _markdown(sets_table(ranking)),
        "## Other orders\n\nSums of errors with the first n sites of each order converted. ![error against FLOPs](pareto.png)",
        _markdown(orders_table(ranking)),
        f"## Use\n\n```yaml\nconvert: {{ranking: this folder/ranking.json, sites: {ranking.choices.suggested}}}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _markdown(table: TextTable) -> str:
    return markdown_table(table.head, table.rows, table.right)
