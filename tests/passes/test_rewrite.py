"""rewrite: the passes over one site's graph, captured from a small module; the arithmetic itself is held by test_reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from edit_compile.config import LinearizeConfig
from edit_compile.designs.base import Design, Tap, Verdict
from edit_compile.errors import RewriteError
from edit_compile.ir.plan import SitePlan
from edit_compile.ir.tokens import TokenLayout
from edit_compile.passes.build_design import build_design
from edit_compile.passes.canonicalize import SDPA
from edit_compile.passes.capture import capture
from edit_compile.passes.rewrite import canonicalize_site, insert_taps, locate_core, normalize_site, replace_core
from edit_compile.passes.site_graph import Refused, SiteGraph

B, H, W, C, HEADS = 2, 5, 7, 8, 2
N = H * W


class Site(nn.Module):
    """Self-attention whose parts the tests replace."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(C, C) for _ in range(4))

    def heads(self, x):
        return x.unflatten(-1, (HEADS, C // HEADS)).transpose(1, 2)

    def keys(self, x):
        return self.k(x)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(*map(self.heads, (q, k, v))).transpose(1, 2).flatten(2)

    def forward(self, x):
        return self.o(self.attend(self.q(x), self.keys(x), self.v(x)))


class ByHand(Site):
    """Heads folded into the batch, as with torch.bmm."""

    def attend(self, q, k, v):
        q, k, v = (self.heads(x).reshape(x.shape[0] * HEADS, x.shape[1], C // HEADS) for x in (q, k, v))
        y = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.5, -1), v)
        return y.view(-1, HEADS, y.shape[1], C // HEADS).transpose(1, 2).flatten(2)


class Rolls(Site):
    def keys(self, x):
        return self.k(x).roll(1, 1)


class TwoKeys(Site):
    def keys(self, x):
        return self.k(x) + self.v(x)


class Twice(Site):
    def forward(self, x):
        return super().forward(super().forward(x))


class TokensFirst(Site):
    def attend(self, q, k, v):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return super().attend(q, k, v)

    def forward(self, x):
        return super().forward(x.transpose(0, 1))


class OwnEdit(Site):
    def __init__(self):
        super().__init__()
        self.edit = nn.Identity()


def plan(kind="attention"):
    layout = TokenLayout.of(("image", "h*w"))
    return SitePlan(path="a", kind=kind, action="keep", reason="", query_layout=layout, key_layout=layout, query_sizes=(N,), key_sizes=(N,))


PASSES = (canonicalize_site, locate_core, build_design, normalize_site, insert_taps, replace_core)


def rewritten(module, passes=PASSES, kind="attention", choice=None, **options):
    """The site's graph after some passes, for a design of one's own or the shipped one for image tokens alone."""
    captured = capture(module, {"x": torch.zeros(B, N, C)}, functional=True)
    (choice,) = LinearizeConfig(design="edit", **options).choices() if choice is None else (choice,)
    site = SiteGraph(module, {"x": torch.zeros(B, N, C)}, captured, plan(kind), choice, captured.graph)
    for run in passes:
        run(site)
    return site


def runnable(kind):
    """A site of this kind with its rewritten graph, the added modules random."""
    torch.manual_seed(0)
    module = kind().double()
    result = rewritten(module, identity=False)
    module.edit = result.choice.design(result.facts, result.choice.options).double()
    return fx.GraphModule(module, result.graph), result


def test_the_facts_say_where_taps_can_be_inserted():
    facts = rewritten(Site(), PASSES[:2]).facts
    assert dict(facts.channels) == {f"{side}_{name}": C for side in ("before", "after") for name in ("query", "key", "value")}
    assert facts.missing == {}
    assert (facts.heads, facts.key_heads, facts.head_dim, facts.value_dim) == (HEADS, HEADS, C // HEADS, C // HEADS)
    assert (facts.scale, facts.mask, facts.causal, facts.grid_dims) == (None, "none", False, None)


def test_linear_attention_stands_in_the_place_of_softmax_attention():
    runner, result = runnable(Site)
    assert not any(n.target is SDPA for n in result.graph.nodes)
    called = [n.target for n in result.graph.nodes if n.op in ("call_module", "get_attr")]
    assert called.count("edit") == 1
    assert {"q", "k", "v", "o", "edit.query", "edit.key", "edit.value"} <= set(called)
    assert runner(torch.randn(B, N, C).double(), torch.empty(H, W))[0].shape == (B, N, C)


def test_heads_folded_into_the_batch_give_the_same():
    x, grid = torch.randn(B, N, C, generator=torch.Generator().manual_seed(1)).double(), torch.empty(H, W)
    folded, plain = runnable(ByHand)[0], runnable(Site)[0]
    torch.testing.assert_close(folded(x, grid)[0], plain(x, grid)[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Rolls, r"a: aten\.roll\.default \(roll\) mixes image tokens between projection and attention"),
        (TwoKeys, "a: .* comes from 2 projections of image tokens, not one"),
        (Twice, "a: captured on its own, the module runs 2 attentions that can be read, not one"),
        (OwnEdit, "a has an attribute 'edit' of its own, the name that added modules get"),
    ],
)
def test_what_stands_in_the_way_is_named(kind, message):
    with pytest.raises(RewriteError, match=message):
        rewritten(kind())


def test_a_refusal_names_the_node():
    with pytest.raises(Refused) as caught:
        rewritten(Rolls())
    assert caught.value.refusal.node == "roll"


class ReturnsWeights(Site):
    def attend(self, q, k, v):
        q, k, v = map(self.heads, (q, k, v))
        self_attention = torch.softmax(q @ k.transpose(-1, -2), -1)
        return (self_attention @ v).transpose(1, 2).flatten(2), self_attention

    def forward(self, x):
        y, weights = self.attend(self.q(x), self.keys(x), self.v(x))
        return self.o(y), weights


class ReadsWeights(ReturnsWeights):
    def forward(self, x):
        y, weights = super().forward(x)
        return y * weights.amax()


def test_a_module_that_returns_its_weights_returns_none_in_their_place():
    """Only modules whose weights nobody reads get here; no product of tokens with tokens is left."""
    graph = rewritten(ReturnsWeights()).graph
    _, weights = graph.output_node().args[0]
    assert weights is None
    assert not any("softmax" in str(node.target) for node in graph.nodes)


def test_a_module_that_reads_its_weights_is_asked_about_them():
    with pytest.raises(RewriteError, match=r"a: captured on its own, the module runs 0 attentions .* return its attention's weights\?"):
        rewritten(ReadsWeights())


class Tapped(Design):
    """Softmax attention with the taps that the tests set."""

    name, made = "tapped", ()

    @classmethod
    def accepts(cls, site, options):
        return Verdict(True, "for a test")

    def taps(self):
        return tuple(self.made)

    def forward(self, x, tokens):
        return F.scaled_dot_product_attention(x.query, x.key, x.value)

    @classmethod
    def flops(cls, site, grid, others, options):
        return 0


def with_taps(*taps):
    """A choice of a design with these taps; a tap's module becomes the design's."""

    class Own(Tapped):
        def __init__(self, site, options):
            super().__init__(site, options)
            self.modules_of_taps = nn.ModuleList(tap.module for tap in taps)
            self.made = taps

    Own.name = "own"
    return LinearizeConfig().choices()[0]._replace(design=Own, options=Own.Options())


@pytest.mark.parametrize("kind", [Rolls, TwoKeys, TokensFirst])
def test_a_design_without_taps_needs_no_linear_to_tap(kind):
    """Nothing runs on fewer tokens, so whatever stands between projection and attention may mix them."""
    assert rewritten(kind(), choice=with_taps()).graph


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        ([Tap("after_query", nn.Identity(), (2, 2))], "the tap 'after_query' thins tokens: only keys and values can be thinned"),
        ([Tap("after_key", nn.Identity(), (2, 2)), Tap("after_value", nn.Identity())], "thins keys and values differently"),
        ([Tap("after_key", nn.Identity()), Tap("after_key", nn.Identity())], "has two taps at one place"),
        ([Tap("before_hidden", nn.Identity())], "a site of kind attention has no place 'before_hidden'"),
    ],
)
def test_taps_that_cannot_be_are_refused(taps, message):
    with pytest.raises(RewriteError, match=message):
        rewritten(Site(), choice=with_taps(*taps))


class Shift(nn.Module):
    """Adds one, to an image or to tokens."""

    def forward(self, x):
        return x + 1


@pytest.mark.parametrize("form", ["image", "tokens"])
@pytest.mark.parametrize("where", ["before_query", "after_query", "before_key", "after_key", "before_value", "after_value"])
def test_a_tap_changes_its_own_operand_at_its_own_place(where, form):
    module = Site()
    shift = Shift()
    site = rewritten(module, choice=with_taps(Tap(where, shift, form=form)))
    site.module.edit = type(site.chosen)(site.facts, None)
    x = torch.randn(B, N, C)
    got = fx.GraphModule(site.module, site.graph)(x, torch.empty(H, W))[0]
    side, _, name = where.partition("_")
    layers = {"query": module.q, "key": module.k, "value": module.v}
    q, k, v = ((layer(x + 1) if side == "before" else layer(x) + 1) if operand == name else layer(x) for operand, layer in layers.items())
    torch.testing.assert_close(got, module.o(module.attend(q, k, v)), atol=1e-6, rtol=1e-5)
    del site.module.edit


class Network(nn.Module):
    """A feed-forward network whose activation, a module of its own, holds the first projection."""

    def __init__(self, gated=False):
        super().__init__()
        self.net = nn.Sequential(Activated(gated), nn.Dropout(0.0), nn.Linear(12, C))

    def forward(self, x):
        return self.net(x)


class Activated(nn.Module):
    def __init__(self, gated):
        super().__init__()
        self.proj, self.gate = nn.Linear(C, 12), nn.Linear(C, 12) if gated else None

    def forward(self, x):
        y = F.gelu(self.proj(x))
        return y if self.gate is None else y * self.gate(x)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("where", ["before_hidden", "after_hidden", "before_output"])
def test_a_feed_forward_network_is_tapped_at_its_places(where, gated):
    module, shift = Network(gated), Shift()
    choice = with_taps(Tap(where, shift))
    choice.design.kind = "feed_forward"
    if gated and where == "after_hidden":
        with pytest.raises(RewriteError, match="a: its hidden channels come from two Linears"):
            rewritten(module, kind="feed_forward", choice=choice)
        return
    site = rewritten(module, kind="feed_forward", choice=choice)
    module.edit = type(site.chosen)(site.facts, None)
    x = torch.randn(B, N, C)
    got = fx.GraphModule(module, site.graph)(x, torch.empty(H, W))[0]
    first, last = module.net[0], module.net[2]
    entering = x + 1 if where == "before_hidden" else x
    hidden = first.proj(entering) + (where == "after_hidden")
    hidden = F.gelu(hidden) * (first.gate(entering) if gated else 1)
    torch.testing.assert_close(got, last(hidden + (where == "before_output")), atol=1e-6, rtol=1e-5)
    assert any(node.op == "call_module" and node.target == "net.0.proj" for node in site.graph.nodes), "adapters on it must act"
