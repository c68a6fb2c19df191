"""Which sites to convert within a budget of FLOPs: `python benchmarks/site_orders.py RANKING [--budgets 0.9 ... 0.4] [--write FILE.md]`.

RANKING is a folder that `edit-compile rank` has finished. For each budget these sets of sites are converted, each site to its best
candidate with the weights of its fit, and the relative error of the model's output is measured: the set that the ranking chooses, the
first sites of the model, its last, and sites in random orders, as few of each as reach the budget. Nothing is trained after the fit.
What was measured is kept in the folder and not measured again.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import edit_compile as ec
from edit_compile.distillation.ranking.budget import parse_budget
from edit_compile.distillation.ranking.choose import Selection
from edit_compile.distillation.ranking.folder import RankingFolder
from edit_compile.distillation.ranking.ranking import Ranking
from edit_compile.distillation.ranking.sets import Sets
from edit_compile.distillation.ranking.subject import RankedModel
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.files import alone_in, write_text
from edit_compile.progress import listening
from edit_compile.report.progress_lines import ProgressLines

BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
RANDOM_ORDERS = 5


def first_within(ranking: Ranking, budget: str, paths: Sequence[str]) -> Selection | None:
    """Convert sites in this order, each to its best candidate, until the budget is reached; None if it never is."""
    parsed, choices = parse_budget(budget), ranking.choices
    for number in range(1, len(paths) + 1):
        selection = choices.selection(parsed, {path: choices.best[path] for path in paths[:number]})
        if selection.flops <= parsed.bound * ranking.flops:
            return selection
    return None


def cell(errors: Sequence[float], selections: Sequence[Selection]) -> str:
    """Show a median error, its range if there are several, and how many sites were converted."""
    middle, numbers = sorted(errors)[len(errors) // 2], sorted({len(selection.converted) for selection in selections})
    spread = f" ({min(errors):.3g} to {max(errors):.3g})" if len(errors) > 1 else ""
    return f"{middle:.3g}{spread}, {'-'.join(map(str, (numbers[0], numbers[-1])[: len(numbers)]))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ranking", type=Path)
    parser.add_argument("--budgets", type=float, nargs="*", default=BUDGETS, help="shares of the model's FLOPs")
    parser.add_argument("--write", type=Path, help="Markdown file; default: standard output")
    args = parser.parse_args()
    ranking = Ranking.read(args.ranking)
    model = RankedModel(Recipe.model_validate(ranking.recipe), ranking.candidates, RankingFolder(args.ranking))
    sets = Sets(model)
    in_model = [site.path for site in ranking.sites if site.path in ranking.choices.best]
    source = random.Random(0)
    orders = [source.sample(in_model, len(in_model)) for _ in range(RANDOM_ORDERS)]
    steps, size = ranking.recipe["layerwise"]["steps"], " x ".join(map(str, ranking.size))
    lines = [
        f"# Which sites of {ranking.model} to convert",
        "",
        f"`python benchmarks/{Path(__file__).name} RANKING`; candidates: {', '.join(map(str, ranking.candidates))}. FLOPs at {size};",
        f"{len(in_model)} sites. Relative error of the output on {ranking.samples} samples that the fits ({steps} steps) never saw,",
        f"and the number of sites converted. Random: median of {RANDOM_ORDERS} orders.",
        "",
        "| budget | chosen | first | last | random |",
        "|---|---|---|---|---|",
    ]
    with alone_in(args.ranking, "ranks in", ec.DistillError), listening(ProgressLines(partial(print, file=sys.stderr))):
        for share in args.budgets:
            budget = f"flops <= {share:g}x"
            kinds = [[in_model], [in_model[::-1]], orders]
            found = [[s for s in (first_within(ranking, budget, order) for order in kind) if s is not None] for kind in kinds]
            if not all(found):
                lines.append(f"| {budget} | not to be reached | | | |")
                continue
            rows = [[ranking.choose(budget)], *found]
            shown = [cell([sets.measured(ranking, selection).measured for selection in row], row) for row in rows]
            lines.append(f"| {budget} | {' | '.join(shown)} |")
    text = "\n".join([*lines, ""])
    print(text) if args.write is None else write_text(args.write, text)


if __name__ == "__main__":
    main()
