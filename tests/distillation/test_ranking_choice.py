"""Choosing sites under a budget, on plain numbers, against trying everything."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edit_compile as ec
from edit_compile.distillation.ranking.budget import Budget, parse_budget
from edit_compile.distillation.ranking.choose import Choices
from edit_compile.distillation.ranking.knapsack import Option, cheapest
from edit_compile.distillation.ranking.ranking import DesignCandidate, Measure, RankedSite, Ranking, parse_candidates, resolve_ranking

TOTAL = 1000
small = st.integers(0, 12)
groups = st.lists(st.lists(st.builds(Option, small, small), min_size=1, max_size=4), max_size=5)


def sums(options, chosen):
    taken = [group[number] for group, number in zip(options, chosen, strict=True)]
    return sum(each.cost for each in taken), sum(each.weight for each in taken)


@given(groups, st.integers(-1, 40))
@settings(max_examples=400)
def test_the_cheapest_choice_is_what_trying_all_finds(options, capacity):
    tried = (sums(options, chosen) for chosen in itertools.product(*(range(len(group)) for group in options)))
    best = min((found for found in tried if found[1] <= capacity), default=None)
    chosen = cheapest(options, capacity)
    assert (None if chosen is None else sums(options, chosen)) == best


@pytest.mark.parametrize("kind", ["equal", "two kinds", "all different"])
def test_equal_blocks_do_not_matter(kind):
    """A hundred sites: the number of partial choices must not explode, nor depend on ties."""
    costs = {"equal": lambda n: 5, "two kinds": lambda n: 5 + n % 2, "all different": lambda n: (n * 7919) % 104_729}[kind]
    options = [[Option(0, 10**13), Option(costs(n), 6 * 10**12), Option(3 * costs(n) + 1, 10**12)] for n in range(100)]
    chosen = cheapest(options, 50 * 10**13)
    assert chosen is not None
    cost, weight = sums(options, chosen)
    assert weight <= 50 * 10**13
    assert cost == least_cost(options, 10**12, 500)


def least_cost(options, unit, capacity):
    """The least cost by dynamic programming over the weight, in units."""
    best = np.full(capacity + 1, 2**60)
    best[0] = 0
    for group in options:
        extended = np.full_like(best, 2**60)
        for option in group:
            weight = option.weight // unit
            extended[weight:] = np.minimum(extended[weight:], best[: capacity + 1 - weight] + option.cost)
        best = extended
    return best.min()


def measure(candidate, error, saved, seconds=None):
    return Measure(candidate=candidate, design="edit", options={}, error=error, bins=(error,), saved_flops=saved, saved_seconds=seconds)


errors = st.floats(0, 1, allow_nan=False, width=32)
measures = st.lists(st.tuples(errors, st.integers(-20, 90)), min_size=0, max_size=3)


def choices(sites, seconds=None):
    found = {f"blocks.{n}.attn": [measure(i, *each) for i, each in enumerate(listed)] for n, listed in enumerate(sites)}
    return Choices(TOTAL, seconds, found)


def all_sets(found):
    """Every set of measures, with its exact sum of errors and of FLOPs saved."""
    for chosen in itertools.product(*([None, *options] for options in found.sites.values())):
        taken = [each for each in chosen if each is not None]
        yield sum((Fraction(each.error) for each in taken), Fraction(0)), sum(each.saved_flops for each in taken), len(taken)


def exact(selection):
    return sum(Fraction(each.error) for each in selection.converted.values()), TOTAL - selection.flops


@given(st.lists(measures, max_size=5), st.integers(1, 99))
@settings(max_examples=200)
def test_a_budget_of_flops_costs_the_least_error(sites, percent):
    found = choices(sites)
    wanted = TOTAL - math.floor(Fraction(percent, 100) * TOTAL)
    within = [(error, -saved) for error, saved, _ in all_sets(found) if saved >= wanted]
    budget = parse_budget(f"flops <= {percent / 100:g}x")
    if not within:
        with pytest.raises(ec.ConfigError, match=r"cannot be reached; the least is flops <= [\d.]+x"):
            found.choose(budget)
        return
    error, saved = exact(found.choose(budget))
    assert (error, -saved) == min(within)


@given(st.lists(measures, max_size=5), st.floats(1e-3, 2))
@settings(max_examples=200)
def test_a_budget_of_error_saves_the_most_flops(sites, bound):
    found = choices(sites)
    text = f"{bound:.4f}"
    within = [(-saved, error) for error, saved, _ in all_sets(found) if error <= Fraction(text)]
    best = min(within)
    if best[0] == 0:
        with pytest.raises(ec.ConfigError, match="leaves every site as it is"):
            found.choose(parse_budget(f"error <= {text}"))
        return
    error, saved = exact(found.choose(parse_budget(f"error <= {text}")))
    assert (-saved, error) == best


def test_the_least_that_is_named_can_be_reached():
    found = choices([[(0.1, 333)], [(0.2, 100), (0.1, 50)], [(0.1, -5)]])
    with pytest.raises(ec.ConfigError, match=r"sites: flops <= 0.5x: cannot be reached; the least is flops <= 0.567x"):
        found.choose(parse_budget("flops <= 0.5x"))
    assert found.choose(parse_budget("flops <= 0.567x")).flops == 567


def test_sites_rank_by_error_for_what_they_save():
    found = choices([[(0.2, 100)], [(0.1, 100), (0.01, 1)], [(0.05, 100)], [(0.3, -100)], []])
    assert list(found.best) == ["blocks.2.attn", "blocks.1.attn", "blocks.0.attn"]
    assert found.choose(parse_budget("best 2")).converted == {"blocks.1.attn": measure(0, 0.1, 100), "blocks.2.attn": measure(0, 0.05, 100)}
    everything = found.choose(parse_budget("all")).converted
    assert {path: each.error for path, each in everything.items()} == {
        "blocks.0.attn": 0.2,
        "blocks.1.attn": 0.1,
        "blocks.2.attn": 0.05,
        "blocks.3.attn": 0.3,
    }
    assert found.describe("blocks.0.attn") == "rank 3 of 3: error 0.2 for 10% of the FLOPs"
    assert found.describe("blocks.3.attn") == "saves no FLOPs: error 0.3, 10% more FLOPs"
    with pytest.raises(ec.ConfigError, match="sites: best 4: only 3 sites save FLOPs"):
        found.choose(parse_budget("best 4"))


def test_time_is_a_budget_where_it_was_measured():
    with pytest.raises(ec.ConfigError, match="time was not measured; `edit-compile rank --time` measures it"):
        choices([[(0.1, 100)]]).choose(parse_budget("time <= 0.9x"))
    timed = {"a": [measure(0, 0.1, 100, 0.125)], "b": [measure(0, 0.2, 300, 0.375)], "c": [measure(0, 0.05, 10, -0.1)]}
    found = Choices(TOTAL, 1.0, timed)
    assert list(found.choose(parse_budget("time <= 0.7x")).converted) == ["b"]
    both = found.choose(parse_budget("time <= 0.5x"))
    assert list(both.converted) == ["a", "b"]
    assert both.seconds == pytest.approx(0.5)
    with pytest.raises(ec.ConfigError, match=r"the least is time <= 0.5x"):
        found.choose(parse_budget("time <= 0.4x"))


def test_what_is_said_of_a_site_is_said_of_what_it_becomes():
    """A budget of time may take a candidate that costs FLOPs, of a site whose best one saves them."""
    found = Choices(TOTAL, 1.0, {"a": [measure(0, 0.25, 100, -0.01), measure(1, 0.5, -50, 0.25)]})
    chosen = found.choose(parse_budget("time <= 0.8x")).converted["a"]
    assert found.describe("a", chosen, timed=True) == "saves no FLOPs: error 0.5, 5% more FLOPs, 250 ms less"
    assert found.describe("a", timed=True) == "rank 1 of 1: error 0.25 for 10% of the FLOPs, 10 ms more"
    assert found.describe("a", chosen) == "saves no FLOPs: error 0.5, 5% more FLOPs"
    assert (found.suggested, found.budgets(2)) == ("flops <= 0.95x", ["flops <= 0.95x", "flops <= 0.9x"])
    assert Choices(TOTAL, None, {"a": [measure(0, 0.5, -50)]}).suggested == "all"


@given(st.lists(st.lists(st.tuples(errors, st.integers(1, 90)), min_size=1, max_size=2), min_size=1, max_size=6))
@settings(max_examples=25)
def test_no_other_order_is_below_the_front(sites):
    found = choices(sites)
    front = [(selection.flops, selection.error) for selection in found.front()]
    for points in (found.in_order(list(found.best)), *found.shuffled(2)):
        for flops, error in points[1:]:
            best = found.choose(Budget("flops", Fraction(flops, TOTAL), "as many FLOPs"))
            assert best.error <= error * (1 + 1e-9)
            assert best.flops <= flops
    assert front == sorted(front, key=lambda point: (-point[0], point[1]))
    assert front[-1][0] == TOTAL - sum(max(m.saved_flops for m in listed) for listed in found.sites.values())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ALL", "all"),
        ("best  3", "best 3"),
        ("flops<=0.5x", "flops <= 0.5x"),
        ("FLOPs <= .5 x", "flops <= .5x"),
        ("time <= 0.7x", "time <= 0.7x"),
        ("error <= 1e-3", "error <= 1e-3"),
    ],
)
def test_budgets_are_read(text, words):
    assert parse_budget(text).text == words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is none of: all, best N, flops <= 0.5x"),
        ("some", "'some' is none of"),
        (5, "'5' is none of"),
        (None, "'None' is none of"),
        ("flops < 0.5x", "is none of"),
        ("best 0", "converts nothing; the least is best 1"),
        ("best -1", "is none of"),
        ("best 1.5", "is none of"),
        ("flops <= 0.5", "write flops <= 0.5x, a share of the whole model's flops"),
        ("flops <= 50%", "is none of"),
        ("flops <= 1x", "between 0 and 1"),
        ("flops <= 0x", "between 0 and 1"),
        ("time <= 2x", "between 0 and 1"),
        ("error <= 0", "the bound is more than 0"),
        ("error <= 0.1x", "an error has no unit; write error <= 0.1"),
        ("error <= nan", "is none of"),
    ],
)
def test_what_is_no_budget_is_refused_in_one_line(text, message):
    with pytest.raises(ec.ConfigError, match=message) as raised:
        parse_budget(text)
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------ ranking.json


def ranking(**changes):
    sites = (
        RankedSite(path="blocks.0.attn", measures=(measure(0, 0.02, 100), measure(1, 0.001, 20))),
        RankedSite(path="blocks.0.cross", reason="cross-attention"),
        RankedSite(path="blocks.1.attn", measures=(measure(0, 0.01, 100),)),
    )
    fields = {
        "model": "toy",
        "recipe": {"layerwise": {"steps": 3}},
        "candidates": (DesignCandidate(design="edit"), DesignCandidate(design="edit", options={"reduction": 8})),
        "size": (32, 32),
        "image_tokens": 256,
        "flops": TOTAL,
        "samples": 8,
        "sites": sites,
    }
    return Ranking(**fields | changes)


def test_a_ranking_becomes_rules_with_their_rank(tmp_path):
    (tmp_path / "ranking.json").write_text(ranking().to_json())
    read = ec.Ranking.read(tmp_path)
    assert read == ranking()
    config = read.config("flops <= 0.9x")
    assert [(rule.paths, rule.design, rule.reason) for rule in config.rules] == [
        ("blocks.0.attn", "keep", "outside the budget (flops <= 0.9x): rank 1 of 2: error 0.001 for 2% of the FLOPs"),
        ("blocks.0.cross", "keep", "cross-attention"),
        ("blocks.1.attn", "edit", "rank 2 of 2: error 0.01 for 10% of the FLOPs"),
    ]
    assert resolve_ranking({"ranking": str(tmp_path / "ranking.json"), "sites": "flops <= 0.9x"}) == config
    assert len([rule for rule in resolve_ranking({"ranking": str(tmp_path)}).rules if rule.design == "edit"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("not JSON", "is not a ranking"),
        ([], "is not a ranking: it is a list"),
        ({"version": 99, "package_version": "9.0"}, "was made by version 9.0 of edit_compile, this is version .*; rank the model again"),
        ({"flops": -1}, "flops"),
        ({"sites": []}, "sites"),
        ({"more": 1}, "more"),
        ({"sites": [{"path": "a"}, {"path": "a"}]}, "the site a is listed twice"),
    ],
)
def test_a_damaged_ranking_is_refused_in_one_line(tmp_path, change, message):
    content = json.loads(ranking().to_json())
    text = change if isinstance(change, str) else json.dumps(content | change if isinstance(change, dict) else change)
    (tmp_path / "ranking.json").write_text(text)
    with pytest.raises(ec.ConfigError, match=message) as raised:
        Ranking.read(tmp_path / "ranking.json")
    assert "\n" not in str(raised.value)


def test_measures_must_be_one_for_each_candidate():
    with pytest.raises(ValueError, match="not one for each of 2 candidates"):
        ranking(sites=(RankedSite(path="a", measures=(measure(2, 0.1, 1),)),))
    with pytest.raises(ValueError, match="time was measured for some of the sites only"):
        ranking(seconds=1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sites": "best 2"}, "sites: best 2: needs a ranking, which `edit-compile rank MODEL` makes"),
        ({"ranking": "nowhere.json"}, "nowhere.json does not exist; `edit-compile rank MODEL -o"),
        ({"ranking": "nowhere.json", "design": "edit"}, "design beside ranking"),
        ({"ranking": "nowhere.json", "reduction": 4}, "reduction beside ranking"),
        ({"ranking": 5}, "ranking: 5 is not the path of a ranking"),
        ({"ranking": None, "sites": "all"}, "ranking: None is not the path of a ranking"),
    ],
)
def test_what_is_no_ranking_is_refused(given, message):
    with pytest.raises(ec.ConfigError, match=message):
        resolve_ranking(given)
    assert resolve_ranking({"sites": "all", "reduction": 8}) == ec.LinearizeConfig(reduction=8)


def test_linearize_config_points_to_rankings():
    with pytest.raises(ec.ConfigError, match="unknown option 'sites': a ranking chooses sites; `edit-compile rank MODEL` makes one"):
        ec.LinearizeConfig(sites="best 3")


def test_candidates_are_names_or_mappings():
    found = parse_candidates(["edit", {"design": "edit", "reduction": 8}, "keep"])
    assert [str(each) for each in found] == ["edit", "edit (reduction=8)"]
    assert parse_candidates("auto")[0].kinds == {"attention"}
    assert parse_candidates("mix-ffn")[0].kinds == {"feed_forward"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["keep"], "name a design beside 'keep'"),
        ([], "name a design"),
        (["edti"], "candidates: unknown design 'edti'; did you mean edit"),
        ([{"reduction": 4}], "neither a design's name nor a mapping"),
        ([3], "candidates: 3 is neither"),
        ([{"design": "edit", "reducton": 4}], "candidates: unknown option 'reducton'; did you mean reduction"),
        ([{"design": "edit", "options": 4}], "its options are a mapping from names, not 4"),
        ([{"design": "edit", 1: 2}], "neither a design's name nor a mapping"),
        ([{"design": "edit", "options": {1: 2}}], "its options are a mapping from names"),
        (["edit", {"design": "edit"}], "edit is listed twice"),
    ],
)
def test_what_is_no_candidate_is_refused(given, message):
    with pytest.raises(ec.ConfigError, match=message):
        parse_candidates(given)
