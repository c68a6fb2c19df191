"""Every shipped design held to what it says: FLOPs against the counter, the registry, verdicts on facts."""

from __future__ import annotations

import itertools
import math
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from pydantic import field_validator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import edit_compile.designs as registry
from edit_compile.config import LinearizeConfig, Rule
from edit_compile.designs import NO_ATTENTION, design_names, find_design, register, unregister
from edit_compile.designs.base import QKV, Design, Tokens, Verdict, tokens_of
from edit_compile.designs.ops.token_spans import to_image, to_tokens
from edit_compile.errors import ConfigError
from edit_compile.ir.site import Site
from edit_compile.ir.tokens import TokenLayout

C, HEADS, TEXT = 24, 2, 7
IMAGE, JOINT = TokenLayout.of(("image", "h*w")), TokenLayout.of(("image", "h*w"), ("text", "t"))
PLACES = tuple(f"{side}_{name}" for side in ("before", "after") for name in ("query", "key", "value", "output"))


def site(layout=IMAGE, kind="attention", **facts):
    sizes = {"heads": HEADS, "key_heads": HEADS, "head_dim": C // HEADS, "value_dim": C // HEADS}
    return Site(kind, "a", layout, layout, 2, dict.fromkeys(PLACES, C), **{**sizes, **facts})


LAYOUTS = {"edit": [IMAGE], "mm-edit": [JOINT], "linear-mm-alpha": [JOINT]}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "edit": [
        {},
        {"features": "learned"},
        {"key": "plain", "value": "plain"},
        {"reduction": 2, "query": "plain"},
        {"key": "conv-fusion", "value": "conv-fusion"},
    ],
    "mm-edit": [
        {},
        {"eta": "ratio", "features": "learned"},
        {"eta": "calibrated", "text_keys": "compressed"},
        {"key": "plain", "value": "plain"},
    ],
    "linear-mm-alpha": [{}, {"reduction": 2, "key": "plain", "value": "plain", "features": "learned"}, {"balance": False}],
    "linfusion": [{}, {"reduction": 4}],
    "kv-compress": [{}, {"factor": 3, "layer_norm": True}, {"balance": False}],
    "sana": [{}],
    "mix-ffn": [{}],
    "clear": [{}, {"radius": 3}],
    "local-linear": [{}, {"radius": 2}],
}
CASES = [(name, options, layout) for name, each in OPTIONS.items() for options in each for layout in LAYOUTS.get(name, [IMAGE, JOINT])]
EITHER = ("linfusion", "kv-compress", "sana", "clear", "local-linear")  # of the layouts


def test_every_shipped_design_is_held_to_its_flops():
    assert set(OPTIONS) == set(design_names())


@pytest.mark.parametrize(("name", "options", "layout"), CASES)
@pytest.mark.parametrize("grid", [(6, 10), (5, 7)])
def test_flops_are_what_the_counter_counts(name, options, layout, grid):
    design = find_design(name)
    facts = site(layout, kind=design.kind)
    chosen, n = design.Options(**options), math.prod(grid)
    others = TEXT if layout is JOINT else 0
    module = design(facts, chosen)
    q, k, v, short_k, short_v = (torch.randn(1, HEADS, n + others, C // HEADS) for _ in range(5))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused kernel
        for tap in module.taps():
            x = torch.randn(1, n, C)
            mapped = tap.module(x) if tap.form == "tokens" else to_tokens(tap.module(to_image(x, grid)))
            if tap.stride:
                short_k, short_v = (torch.randn(1, HEADS, mapped.shape[1] + others, C // HEADS) for _ in range(2))
        kinds, lengths = ("image", "text")[: 1 + bool(others)], (n, others)[: 1 + bool(others)]
        original = QKV(q, k, v) if module.needs_original else None
        if design.kind == "attention":
            module(QKV(q, short_k, short_v, None, original), Tokens(kinds, lengths, grid))
    assert design.flops(facts, grid, others, chosen) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "facts", "reason"),
    [
        ("edit", {}, None),
        ("edit", {"layout": JOINT}, "it is for attention between image tokens alone"),
        ("edit", {"mask": "by_query"}, "the mask differs from query to query"),
        ("edit", {"mask": "by_key"}, None),
        ("edit", {"causal": True}, "causal attention"),
        ("mm-edit", {"layout": JOINT}, None),
        ("mm-edit", {}, "it is for joint attention of image tokens and others"),
        ("mm-edit", {"layout": JOINT, "causal": True}, "causal attention"),
        ("linear-mm-alpha", {}, "it is for joint attention of image tokens and others"),
        ("linear-mm-alpha", {"layout": JOINT}, None),
        *[(name, {"layout": layout}, None) for name in EITHER for layout in (IMAGE, JOINT)],
        *[(name, {"mask": "by_query"}, "the mask differs from query to query") for name in EITHER],
    ],
)
def test_a_design_judges_the_facts(name, facts, reason):
    design = find_design(name)
    verdict = design.accepts(site(**facts), design.Options())
    assert verdict.ok is (reason is None)
    assert reason is None or verdict.reason == reason


def test_by_default_no_product_of_image_tokens_by_image_tokens_is_allowed():
    for name in set(design_names()) - {"kv-compress", "clear", "local-linear"}:
        design = find_design(name)
        assert not design.allows(35, 12, (5, 7), design.Options())
        assert design.allows(35, 1, (5, 7), design.Options())


class Nothing(Design):
    """A design that takes nothing."""

    name = "nothing"

    @classmethod
    def accepts(cls, site, options):
        return Verdict(False, "it takes nothing")

    @classmethod
    def flops(cls, site, grid, others, options):
        return 0


@pytest.fixture
def nothing():
    yield register(Nothing)
    unregister("nothing")


def test_a_registered_design_is_found_by_name(nothing):
    assert find_design("nothing") is nothing
    assert "nothing" in design_names()
    assert LinearizeConfig(design="nothing").choices()[0].design is nothing
    with pytest.raises(ConfigError, match="a design named 'nothing' exists already"):
        register(type("Other", (Nothing,), {}))
    again = type("Nothing", (Nothing,), {"__module__": __name__, "__qualname__": "Nothing"})
    register(again)  # a notebook's cell that is run twice
    assert find_design("nothing") is again


class Brings(Nothing):
    """A design that brings whatever its option says."""

    name = "brings"

    class Options(Design.Options):
        number: int = 2

    @classmethod
    def companions(cls, options):
        return [(Nothing, Nothing.Options(), None)[: options.number]] * 2


def test_a_design_brings_others_to_sites_beside_its_own():
    register(Brings)
    try:
        brings, *brought, edit = LinearizeConfig(rules=[Rule("*.a", "brings"), Rule("*", "edit")]).choices()
        assert (brings.paths, brings.brought_by, edit.brought_by) == ("*.a", None, None)
        assert [(c.paths, c.design.name, c.brought_by) for c in brought] == [("*", "nothing", brings)] * 2
        assert len(LinearizeConfig(rules=[Rule("*.a", "brings", companions=False)]).choices()) == 1
        with pytest.raises(ConfigError, match=r"^`companions` of the design 'brings' fails: ValueError: too many values to unpack"):
            LinearizeConfig(design="brings", number=3)
    finally:
        unregister("brings")


@pytest.mark.parametrize("name", ["auto", "fast", "keep", "edit"])
def test_names_that_mean_something_are_taken(name):
    with pytest.raises(ConfigError, match=f"a design named '{name}' exists already"):
        register(type("Other", (Nothing,), {"name": name}))


@pytest.mark.parametrize("what", [object, "edit", Nothing.__bases__[0]])
def test_only_designs_with_a_name_can_be_registered(what):
    with pytest.raises(ConfigError, match=r"cannot be registered: a design is a subclass of edit_compile\.Design with a name"):
        register(what)


@pytest.fixture
def installed(monkeypatch):
    """Entry points as another package would have them."""

    def install(**entries):
        found = [EntryPoint(name, value, registry.GROUP) for name, value in entries.items()]
        monkeypatch.setattr(registry, "entry_points", lambda group: found if group == registry.GROUP else [])
        registry._installed.cache_clear()
        registry._load.cache_clear()

    yield install
    registry._installed.cache_clear()
    registry._load.cache_clear()


def test_a_design_of_an_installed_package_is_offered_and_loaded_when_it_is_used(installed):
    installed(theirs=f"{__name__}:Nothing", broken="no_such_module:Design", other=f"{__name__}:site")
    assert {"theirs", "broken", "other"} <= set(design_names())
    assert find_design("theirs") is Nothing
    with pytest.raises(ConfigError, match=r"the design 'broken' of no_such_module:Design cannot be loaded: ModuleNotFoundError"):
        find_design("broken")
    with pytest.raises(ConfigError, match="is test_designs:site, which is not a Design"):
        find_design("other")


class Costless(Nothing):
    """A design that does not say what it costs."""

    name, flops = "costless", Design.flops


def test_a_design_says_what_it_costs():
    with pytest.raises(ConfigError, match="the design 'costless' says nothing of its cost: give it a `flops`, or `parts`"):
        register(Costless)


def test_flops_alone_stand_for_one_product():
    counts = type("Counts", (Nothing,), {"flops": classmethod(lambda cls, *_: 10**9)})
    (part,) = counts.parts(site(), (4, 6), 0, None)
    assert part.flops == pytest.approx(10**9, rel=2e-3)


def test_no_attention_is_known_but_not_offered():
    assert find_design(NO_ATTENTION).name == NO_ATTENTION
    assert NO_ATTENTION not in design_names()
    with pytest.raises(ConfigError, match="exists already"):
        register(type("Other", (Nothing,), {"name": NO_ATTENTION}))


def test_an_unknown_design_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown design 'mm-edt'; did you mean mm-edit\? there are: edit, mm-edit"):
        find_design("mm-edt")


BAD_CONFIGS = {
    "an option of no design": (
        {"reduktion": 2},
        r"unknown option 'reduktion'; did you mean reduction\? there are: design, include, .*eta",
    ),
    "an option of another design": ({"design": "edit", "eta": "ratio"}, "unknown option 'eta'"),
    "a value": ({"reduction": 0}, "reduction=0: input should be greater than 0"),
    "keys without values": ({"key": "plain"}, "key='plain' and value='compressor': compress both or neither"),
    "rules and a design": ({"rules": (Rule(design="edit"),), "design": "edit"}, "give either rules or a design and its options"),
    "everything kept": ({"design": "keep"}, "design='keep' converts nothing"),
}


def test_fast_is_auto_with_options_of_its_own():
    auto, fast, other = (LinearizeConfig(**given).choices() for given in ({}, {"design": "fast"}, {"design": "fast", "reduction": 2}))
    assert [choice.design for choice in auto] == [choice.design for choice in fast]
    assert [choice.options.reduction for choices in (auto, fast, other) for choice in choices] == [4, 4, 8, 8, 2, 2]
    assert [choice.options for choice in fast] == [choice.options.model_copy(update={"reduction": 8}) for choice in auto]
    with pytest.raises(ConfigError, match="unknown option 'factor'"):
        LinearizeConfig(design="fast", factor=2)


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_impossible_configurations_are_refused(case):
    options, message = BAD_CONFIGS[case]
    with pytest.raises(ConfigError, match=message):
        LinearizeConfig(**options)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"design": "edt"}, "unknown design 'edt'"),
        ({"design": "edit", "options": {"eta": "ratio"}}, "unknown option 'eta'"),
        ({"design": "keep", "options": {"reduction": 2}}, "design='keep' has no options"),
        (
            {"design": "edit", "options": {"reductoin": 2}},
            r"did you mean reduction\? there are: reduction, query, key, value, features, identity, temporal, temporal_stride, separable$",
        ),
        ({"design": "auto"}, "design='auto' is not for rules: give a rule for each of mm-edit, edit"),
        ({"design": "fast"}, "design='fast' is not for rules: give a rule for each of mm-edit, edit"),
        ({}, "^design is missing: it has no default$"),
        ({"design": "edit", "path": "*"}, r"unknown option 'path'; did you mean paths\?"),
    ],
)
def test_impossible_rules_are_refused(rule, message):
    with pytest.raises(ConfigError, match=message):
        Rule(**rule)


class Picky(Nothing):
    """A design whose options have a validator of each sort."""

    name = "picky"

    class Options(Design.Options):
        odd: int

        @field_validator("odd")
        @classmethod
        def _odd(cls, value):
            if value == 0:
                raise RuntimeError("zero\nis special")
            if value % 2 == 0:
                raise ValueError("must be\nodd")
            return value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "^odd is missing: it has no default$"),
        ({"odd": 2}, "^odd=2: must be odd$"),
        ({"odd": 0}, "^the options of the design 'picky' cannot be checked: RuntimeError: zero is special$"),
    ],
)
def test_what_validators_of_others_say_is_one_line(options, message):
    register(Picky)
    try:
        for make in (lambda: LinearizeConfig(design="picky", **options), lambda: Rule("*", "picky", options)):
            with pytest.raises(ConfigError, match=message):
                make()
    finally:
        unregister("picky")


def test_options_of_another_sort_are_refused_at_once():
    with pytest.raises(ConfigError, match=r"the Options of the design 'plain' are not a subclass of edit_compile\.Design\.Options"):
        register(type("Plain", (Nothing,), {"name": "plain", "Options": dict}))


@pytest.mark.parametrize(
    "config",
    [
        LinearizeConfig(),
        LinearizeConfig(design="edit", reduction=2, include=("a.*",)),
        LinearizeConfig(rules=[Rule("*.a", "mm-edit", {"eta": "ratio"}), Rule("*", "keep")]),
    ],
)
def test_a_configuration_is_data(config):
    assert LinearizeConfig.model_validate(config.model_dump(mode="json")) == config
    assert hash(LinearizeConfig.model_validate(config.model_dump())) == hash(config)


def test_options_may_be_flat_or_nested():
    assert LinearizeConfig.model_validate({"options": {"reduction": 2}}) == LinearizeConfig(reduction=2)


SEGMENTS = [("other", 2), ("text", 3), ("image", 12), ("text", 4)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::3])
@pytest.mark.parametrize("unknown", [0, 1, 3])
def test_tokens_are_cut_and_joined_in_the_models_order(order, unknown):
    segments = [SEGMENTS[i] for i in order]
    x = torch.arange(21.0)[None, None, :, None]
    lengths = [None if kind == "image" or i == unknown else n for i, (kind, n) in zip(order, segments, strict=True)]
    tokens = tokens_of(x, 2, torch.empty(3, 4), [kind for kind, _ in segments], lengths)
    assert tokens.lengths == tuple(n for _, n in segments)
    assert tokens.grid == (3, 4)
    start = sum(n for _, n in segments[: order.index(2)])
    assert torch.equal(tokens.image(x), x[:, :, start : start + 12])
    assert torch.equal(tokens.joined(tokens.image(x), tokens.others(x)), x)
    assert [(s.kind, s.start, s.length) for s in tokens.spans()] == [
        (kind, sum(n for _, n in segments[:i]), n) for i, (kind, n) in enumerate(segments)
    ]
    thin = tokens.thinned((2, 2))
    assert (thin.grid, sum(thin.lengths)) == ((2, 2), 21 - 12 + 4)


def test_a_grid_in_time_is_a_grid():
    tokens = tokens_of(torch.zeros(1, 2, 30 + 4, 3), 2, torch.empty(2, 3, 5), ("image", "text"), (None, None))
    assert tokens.lengths == (30, 4)
    assert tokens.thinned((1, 2, 2)).grid == (2, 2, 3)


def test_image_tokens_that_do_not_fill_their_grid_are_refused():
    with pytest.raises(ValueError, match="13 image tokens do not fill a grid of 3 x 4 = 12"):
        tokens_of(torch.zeros(1, 1, 13, 1), 2, torch.empty(3, 4), ("image",), (None,))
