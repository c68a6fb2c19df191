"""Designs that others got wrong: each mistake is told in one line that names the design and what is wrong with it."""

from __future__ import annotations

import re

import pytest
from torch import nn

import edit_compile as ec
import toy
from edit_compile.designs import unregister


class Sound(ec.Design):
    """Linear attention; what a case gets wrong is put over it."""

    @classmethod
    def accepts(cls, site, options):
        return ec.Verdict(True, "fine")

    @classmethod
    def flops(cls, site, grid, others, options):
        return 0

    def __init__(self, site, options):
        super().__init__(site, options)
        channels = site.channels["after_key"]
        self.keeping, self.thinning = (nn.Conv2d(channels, channels, 3, stride=stride, padding=1) for stride in (1, 2))
        self.outside = [nn.Identity()]

    def forward(self, x, tokens):
        q, k = x.query.relu(), x.key.relu()
        return q @ (k.mT @ x.value) / (q @ k.sum(-2, keepdim=True).mT).clamp(min=1e-6)


def fails(*_):
    raise RuntimeError("no\nmore")


def planned(model=None, inputs=None, **methods):
    design = ec.register(type("Wrong", (Sound,), {"name": "wrong", **methods}))
    try:
        return ec.plan(model or toy.Toy(blocks=1), ec.LinearizeConfig(design="wrong"), inputs or toy.inputs()).sites[0]
    finally:
        unregister(design.name)


def taps(*made):
    return {"taps": lambda self: tuple(tap(self) for tap in made)}


def tap(module, *, where="after_key", **options):
    return lambda self: ec.Tap(where, module(self), **options)


def same(self):
    return self.keeping


def half(self):
    return self.thinning


WRONG = {
    "accepts fails": (
        {"accepts": classmethod(fails)},
        r"`accepts` of the design 'wrong' fails: RuntimeError: no at .*test_bad_designs\.py:",
    ),
    "accepts is a bool": ({"accepts": lambda *_: True}, r"`accepts` of the design 'wrong' (returns True, not a Verdict|fails: TypeError)"),
    "accepts is no": ({"accepts": classmethod(lambda *_: (False, "no"))}, r"returns \(False, 'no'\), not a Verdict\(ok, reason\)"),
    "verdict in lines": ({"accepts": classmethod(lambda *_: ec.Verdict(False, "a\n  b"))}, "^a b$"),
    "init fails": ({"__init__": fails}, "`__init__` of the design 'wrong' fails: RuntimeError: no at "),
    "a key of its own": ({"__init__": lambda *_: {}["foo"]}, "`__init__` of the design 'wrong' fails: KeyError: 'foo' at "),
    "taps fail": ({"taps": fails}, "`taps` of the design 'wrong' fails: RuntimeError: no at "),
    "no taps": ({"taps": lambda self: None}, "`taps` of the design 'wrong' fails: TypeError"),
    "taps of something": (taps(same), r"`taps` gives Conv2d, not a Tap\(where, module\)"),
    "no such place": (taps(tap(same, where="after_kay")), "a site of kind attention has no place 'after_kay'"),
    "no submodule": (taps(tap(lambda self: self.outside[0])), "the module of the tap 'after_key' is not one of the design's submodules"),
    "form": (taps(tap(same, form="picture")), "the tap 'after_key' has form='picture'; it is 'image' or 'tokens'"),
    "stride of a number": (taps(tap(half, stride=2)), "has stride=2; it is a step of 1 or more for each of 2 dimensions"),
    "stride of another grid": (taps(tap(half, stride=(2, 2, 2))), r"has stride=\(2, 2, 2\); it is a step of 1"),
    "thins in silence": (taps(tap(half)), r"stride=\(\) makes \(2, 24, 3, 4\) of \(2, 24, 5, 7\), not \(2, 24, 5, 7\)"),
    "says it thins": (
        taps(tap(same, stride=(2, 2)), tap(same, where="after_value", stride=(2, 2))),
        r"stride=\(2, 2\) makes \(2, 24, 5, 7\) of .*, not \(2, 24, 3, 4\)",
    ),
    "keys alone": (taps(tap(half, stride=(2, 2))), "has two taps at one place, or thins keys and values differently"),
    "forward fails": (
        {"forward": fails},
        r"^rewritten with the design 'wrong' the site cannot run: RuntimeError: no at .*test_bad_designs\.py:",
    ),
    "shape": (
        {"forward": lambda s, x, t: x.value[:, :, :5]},
        r"`forward` of the design 'wrong' returns \(2, 2, 5, 12\) .* not \(2, 2, 35, 12\)",
    ),
    "dtype": ({"forward": lambda s, x, t: x.value.double()}, r"returns \(2, 2, 35, 12\) of torch\.float64, not .* of torch\.bfloat16"),
    "tuple": ({"forward": lambda s, x, t: (x.value,)}, "`forward` of the design 'wrong' returns a tuple, not"),
    "allows fails": ({"allows": classmethod(fails)}, "`allows` of the design 'wrong' fails: RuntimeError: no at "),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_the_reason_in_one_line(case, capfd):
    methods, reason = WRONG[case]
    site = planned(**methods)
    assert site.action == "keep"
    assert re.search(reason, site.reason), site.reason
    assert "\n" not in site.reason
    assert capfd.readouterr().err == ""


def test_taps_may_come_in_any_collection():
    for kind in (list, iter):
        assert planned(taps=lambda self, kind=kind: kind([ec.Tap("after_key", self.keeping)])).action == "wrong"


def test_a_design_without_matrix_products_is_fine():
    assert planned(forward=lambda self, x, tokens: x.query * x.value.cumsum(2)).action == "wrong"


def broadcast(self, x, tokens):
    weights = (x.query[:, :, :, None] * x.key[:, :, None]).sum(-1).softmax(-1)
    return (weights[..., None] * x.value[:, :, None]).sum(-2)


def test_what_is_quadratic_without_matrix_products_is_found():
    with pytest.raises(ec.AuditError, match=r"mul \(mul\) pairs 35 image tokens with 35, which its `allows` refuses"):
        planned(forward=broadcast)
