"""The multiple-choice knapsack problem, exactly: one option of each group, at the least cost, within a capacity.

Options are pairs of integers, so that sums are exact and ties are ties. Partial choices are extended group by group. A partial
choice is dropped if another one has no more weight and no more cost, or if even the linear relaxation of the groups that are left
cannot bring it below the cost of a choice that is known (Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004, chapter 11).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Option(NamedTuple):
    """One option of a group: what it costs, and how much of the capacity it takes."""

    cost: int
    weight: int


class _Increment(NamedTuple):
    """A step from one option of a group to the next along its lower convex hull: more weight, less cost."""

    saved: int
    weight: int
    group: int
    option: int


class _Partial(NamedTuple):
    """A choice among the first groups; `before` is the one it extends, and `option` what it takes of the last group."""

    weight: int
    cost: int
    option: int
    before: _Partial | None


def cheapest(groups: Sequence[Sequence[Option]], capacity: int) -> list[int] | None:
    """Choose an option of each group: the least sum of costs, and of those the least weight, with a sum of weights within the capacity.

    Returns:
        The number of the option in each group; None if there is no choice within the capacity.
    """
    relaxations = [_Relaxation(groups[first:]) for first in range(len(groups) + 1)]
    if relaxations[0].least_weight > capacity:
        return None
    known = relaxations[0].rounded_cost(capacity)
    partials = [_Partial(0, 0, -1, None)]
    for group, rest in zip(groups, relaxations[1:], strict=True):
        extended = (
            _Partial(at.weight + option.weight, at.cost + option.cost, number, at) for at in partials for number, option in enumerate(group)
        )
        hopeful = [p for p in extended if rest.may_stay_within(known - p.cost, capacity - p.weight)]
        partials = _without_dominated(hopeful)
    best: _Partial | None = min(partials, key=lambda partial: (partial.cost, partial.weight))
    chosen = []
    while best is not None and best.before is not None:
        chosen.append(best.option)
        best = best.before
    return chosen[::-1]


def _without_dominated(partials: list[_Partial]) -> list[_Partial]:
    kept: list[_Partial] = []
    for partial in sorted(partials, key=lambda p: (p.weight, p.cost)):
        if not kept or partial.cost < kept[-1].cost:
            kept.append(partial)
    return kept


class _Relaxation:
    """The linear relaxation of some groups: the least cost as a function of the capacity, convex and piecewise linear.

    Attributes:
        least_weight: of all choices.
    """

    def __init__(self, groups: Sequence[Sequence[Option]]) -> None:
        hulls = [_hull(group) for group in groups]
        steps = [step for number, hull in enumerate(hulls) for step in _increments(number, groups[number], hull)]
        self.increments = sorted(steps, key=_Steepness)
        lightest = [group[hull[0]] for group, hull in zip(groups, hulls, strict=True)]
        self.least_weight = sum(option.weight for option in lightest)
        self.weights, self.costs = [self.least_weight], [sum(option.cost for option in lightest)]
        for step in self.increments:
            self.weights.append(self.weights[-1] + step.weight)
            self.costs.append(self.costs[-1] - step.saved)

    def may_stay_within(self, cost: int, capacity: int) -> bool:
        """Say whether the groups can be chosen within a capacity at no more than a cost, as far as the relaxation tells."""
        if capacity < self.least_weight:
            return False
        at = bisect_right(self.weights, capacity) - 1
        missing = self.costs[at] - cost  # to be saved with what is left of the capacity
        if missing <= 0 or at == len(self.increments):
            return missing <= 0
        step = self.increments[at]
        return missing * step.weight <= (capacity - self.weights[at]) * step.saved

    def rounded_cost(self, capacity: int) -> int:
        """Return the cost of a good choice within the capacity: the relaxation's steps in order, those that fit."""
        cost, left = self.costs[0], capacity - self.least_weight
        stopped: set[int] = set()
        for step in self.increments:
            if step.group in stopped or step.weight > left:
                stopped.add(step.group)
            else:
                cost, left = cost - step.saved, left - step.weight
        return cost


class _Steepness:
    """Sorts increments by cost saved for their weight, the most first, exactly; those of one group stay in order."""

    def __init__(self, step: _Increment) -> None:
        self.step = step

    def __lt__(self, other: _Steepness) -> bool:
        return self.step.saved * other.step.weight > other.step.saved * self.step.weight


def _hull(group: Sequence[Option]) -> list[int]:
    """List the options on the lower left convex hull of a group, from the least weight on."""
    hull: list[int] = []
    for number in sorted(range(len(group)), key=lambda n: (group[n].weight, group[n].cost)):
        if hull and group[number].cost >= group[hull[-1]].cost:
            continue
        while len(hull) > 1 and not _turns_left(group[hull[-2]], group[hull[-1]], group[number]):
            hull.pop()
        hull.append(number)
    return hull


def _turns_left(a: Option, b: Option, c: Option) -> bool:
    """Say whether cost falls faster from a to b than from b to c."""
    return (a.cost - b.cost) * (c.weight - b.weight) > (b.cost - c.cost) * (b.weight - a.weight)


def _increments(number: int, group: Sequence[Option], hull: Sequence[int]) -> list[_Increment]:
    return [_Increment(group[a].cost - group[b].cost, group[b].weight - group[a].weight, number, b) for a, b in pairwise(hull)]
