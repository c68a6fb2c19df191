"""Choosing the sites to convert, on plain numbers.

Errors are assumed to add: sums of squares do where the changes that sites make to the output are uncorrelated. What the chosen
set really does is measured afterwards; see `measure`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Protocol

from edit_compile.distillation.ranking.budget import Budget
from edit_compile.distillation.ranking.knapsack import Option, cheapest
from edit_compile.errors import ConfigError
from edit_compile.words import two_digits


class SiteEffect(Protocol):
    """What a choice is made by: see `ranking.Measure`."""

    @property
    def candidate(self) -> int: ...
    @property
    def design(self) -> str: ...
    @property
    def options(self) -> dict[str, Any]: ...
    @property
    def error(self) -> float: ...
    @property
    def saved_flops(self) -> int: ...
    @property
    def saved_seconds(self) -> float | None: ...


@dataclass(frozen=True)
class Selection:
    """The sites to convert.

    Attributes:
        converted: what each of them becomes, by path, in order of execution.
        error: the sum of their errors.
        flops: of one forward with them converted.
        seconds: likewise, if it was measured.
    """

    budget: Budget
    converted: Mapping[str, SiteEffect]
    error: float
    flops: int
    seconds: float | None


@dataclass(frozen=True)
class Choices:
    """What can be chosen.

    Attributes:
        flops, seconds: of one forward of the model as it is; None if time was not measured.
        sites: what each site may become, by path, besides staying as it is; none for sites that no design takes.
    """

    flops: int
    seconds: float | None
    sites: Mapping[str, Sequence[SiteEffect]]

    @cached_property
    def best(self) -> dict[str, SiteEffect]:
        """The sites that can save FLOPs, each with its best candidate, the best site first: least error for what is saved."""
        saving = {path: [measure for measure in found if measure.saved_flops > 0] for path, found in self.sites.items()}
        best = {path: min(found, key=_price) for path, found in saving.items() if found}
        return dict(sorted(best.items(), key=lambda item: _price(item[1])))

    def choose(self, budget: Budget) -> Selection:
        """Choose the best sites and candidates within a budget.

        Raises:
            ConfigError: it cannot be reached, or leaves every site as it is.
        """
        rules = {"all": self._all, "best": self._best, "flops": self._cheaper, "time": self._faster, "error": self._accurate}
        chosen = rules[budget.quantity](budget)
        if not chosen:
            raise ConfigError(f"sites: {budget.text}: leaves every site as it is; {self._least_error()}")
        return self.selection(budget, chosen)

    def selection(self, budget: Budget, chosen: Mapping[str, SiteEffect]) -> Selection:
        """Sum up what converting some sites does."""
        converted = {path: chosen[path] for path in self.sites if path in chosen}
        saved = sum(measure.saved_flops for measure in converted.values())
        seconds = None if self.seconds is None else self.seconds - math.fsum(m.saved_seconds or 0.0 for m in converted.values())
        return Selection(budget, converted, math.fsum(m.error for m in converted.values()), self.flops - saved, seconds)

    def describe(self, path: str, measure: SiteEffect | None = None, *, timed: bool = False) -> str:
        """Say how a site ranks, and what it costs and saves.

        Args:
            measure: as this; default: as its best candidate.
            timed: name the time as well.
        """
        shown = measure or self.best.get(path) or min(self.sites[path], key=lambda m: m.error)
        error, share = f"error {shown.error:.2g}", f"{two_digits(100 * abs(shown.saved_flops) / self.flops)}%"
        time = ""
        if timed and shown.saved_seconds is not None:
            time = f", {two_digits(1000 * abs(shown.saved_seconds))} ms {'less' if shown.saved_seconds >= 0 else 'more'}"
        if shown.saved_flops > 0:
            return f"rank {list(self.best).index(path) + 1} of {len(self.best)}: {error} for {share} of the FLOPs{time}"
        return f"saves no FLOPs: {error}" + (f", {share} more FLOPs" if shown.saved_flops else "") + time

    def budgets(self, parts: int) -> list[str]:
        """Spell budgets of FLOPs that can be reached, from a part of what can be saved to all of it."""
        shares = [1 - Fraction((self.flops - self._least_flops) * number, self.flops * parts) for number in range(1, parts + 1)]
        return [f"flops <= {math.ceil(share * 1000) / 1000:g}x" for share in shares if math.ceil(share * 1000) < 1000]

    @property
    def suggested(self) -> str:
        """A budget to begin with: half of what can be saved."""
        return next(iter(self.budgets(2)), "all")

    # ------------------------------------------------------------------ the budgets

    @cached_property
    def _least_flops(self) -> int:
        """The FLOPs with every site converted to what saves most, those that save nothing as they are."""
        return self.flops - sum(max([0, *(m.saved_flops for m in found)]) for found in self.sites.values())

    def _all(self, budget: Budget) -> dict[str, SiteEffect]:
        least = {path: min(found, key=lambda m: (m.error, -m.saved_flops)) for path, found in self.sites.items() if found}
        return {**least, **self.best}

    def _best(self, budget: Budget) -> dict[str, SiteEffect]:
        number, ranked = int(budget.bound), list(self.best.items())
        if number > len(ranked):
            raise ConfigError(f"sites: {budget.text}: only {len(ranked)} sites save FLOPs")
        return dict(ranked[:number])

    def _cheaper(self, budget: Budget) -> dict[str, SiteEffect]:
        within = math.floor(budget.bound * self.flops)
        chosen = self._least_damage([[-m.saved_flops for m in found] for found in self.sites.values()], within - self.flops)
        if chosen is None:
            least = _rounded_up(Fraction(self._least_flops, self.flops))
            raise ConfigError(f"sites: {budget.text}: cannot be reached; the least is flops <= {least}x")
        return chosen

    def _faster(self, budget: Budget) -> dict[str, SiteEffect]:
        if self.seconds is None:
            raise ConfigError(f"sites: {budget.text}: time was not measured; `edit-compile rank --time` measures it")
        saved = [[Fraction(m.saved_seconds or 0.0) for m in found] for found in self.sites.values()]
        total = Fraction(self.seconds)
        scale = math.lcm(total.denominator, *(s.denominator for found in saved for s in found))
        within = math.floor((budget.bound * total - total) * scale)
        chosen = self._least_damage([[int(-s * scale) for s in found] for found in saved], within)
        if chosen is None:
            least = (total - sum(max([Fraction(0), *found]) for found in saved)) / total
            raise ConfigError(f"sites: {budget.text}: cannot be reached; the least is time <= {_rounded_up(least)}x")
        return chosen

    def _least_damage(self, weights: Sequence[Sequence[int]], capacity: int) -> dict[str, SiteEffect] | None:
        """Choose the least sum of errors with a sum of weights within a capacity; staying as it is weighs nothing."""
        errors = self._errors
        groups = [[Option(0, 0), *map(Option, e, w)] for e, w in zip(errors, weights, strict=True)]
        return self._named(cheapest(groups, capacity))

    def _accurate(self, budget: Budget) -> dict[str, SiteEffect]:
        """Choose the most FLOPs saved with a sum of errors within the bound."""
        groups = [
            [Option(0, 0), *(Option(-m.saved_flops, error) for m, error in zip(found, errors, strict=True))]
            for found, errors in zip(self.sites.values(), self._errors, strict=True)
        ]
        return self._named(cheapest(groups, math.floor(budget.bound * self._error_scale))) or {}

    @cached_property
    def _error_scale(self) -> int:
        """What makes integers of all errors: they are binary fractions."""
        return math.lcm(*(Fraction(m.error).denominator for found in self.sites.values() for m in found))

    @cached_property
    def _errors(self) -> list[list[int]]:
        return [[int(Fraction(m.error) * self._error_scale) for m in found] for found in self.sites.values()]

    def _named(self, options: list[int] | None) -> dict[str, SiteEffect] | None:
        if options is None:
            return None
        return {path: self.sites[path][number - 1] for path, number in zip(self.sites, options, strict=True) if number}

    def _least_error(self) -> str:
        errors = [measure.error for measure in self.best.values()]
        return f"the least error of a site is {min(errors):.2g}" if errors else "none saves FLOPs"

    # ------------------------------------------------------------------ for comparison

    def front(self, points: int = 101) -> list[Selection]:
        """Choose for budgets of FLOPs, evenly from the model as it is down to the least, without repetitions."""
        found: dict[int, Selection] = {}
        for number in range(1, points):
            within = self.flops - math.ceil((self.flops - self._least_flops) * Fraction(number, points - 1))
            budget = Budget("flops", Fraction(within, self.flops), f"flops <= {within / self.flops:.3g}x")
            chosen = self._cheaper(budget)
            if chosen:
                selection = self.selection(budget, chosen)
                found[selection.flops] = selection
        return list(found.values())

    def in_order(self, paths: Sequence[str]) -> list[tuple[int, float]]:
        """Convert sites one after the other, each to its best candidate: FLOPs and the sum of errors after each, from none on."""
        points = [(self.flops, 0.0)]
        for path in paths:
            measure = self.best[path]
            points.append((points[-1][0] - measure.saved_flops, points[-1][1] + measure.error))
        return points

    def shuffled(self, orders: int = 200) -> list[list[tuple[int, float]]]:
        """Do `in_order` for random orders of the ranked sites, the same at every call."""
        source, paths = random.Random(0), [path for path in self.sites if path in self.best]
        return [self.in_order(source.sample(paths, len(paths))) for _ in range(orders)]


def _price(measure: SiteEffect) -> tuple[Fraction, int]:
    """Sort by the error for each FLOP saved; of two with the same, the one that saves more comes first."""
    return Fraction(measure.error) / measure.saved_flops, -measure.saved_flops


def _rounded_up(share: Fraction) -> str:
    return f"{math.ceil(share * 10_000) / 10_000:g}"
