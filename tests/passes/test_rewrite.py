"""rewrite: one site's graph, captured from a small module; the arithmetic itself is held by test_reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from edit_compile.config import LinearizeConfig
from edit_compile.designs import find_design
from edit_compile.errors import RewriteError
from edit_compile.ir.plan import SitePlan
from edit_compile.ir.tokens import TokenLayout
from edit_compile.passes.capture import capture
from edit_compile.passes.find_attention import SDPA
from edit_compile.passes.rewrite import rewrite_site

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


def plan(length=N):
    layout = TokenLayout.of(("image", "h*w"))
    return SitePlan(path="a", action="edit", reason="", query_layout=layout, key_layout=layout, query_sizes=(length,), key_sizes=(length,))


def rewritten(module, config=None):
    return rewrite_site(capture(module, {"x": torch.zeros(B, N, C)}), module, plan(), config or LinearizeConfig())


def runnable(kind):
    """A site of this kind with its rewritten graph, the added modules random."""
    torch.manual_seed(0)
    module, config = kind().double(), LinearizeConfig(identity=False)
    result = rewritten(module, config)
    module.edit = find_design("edit").build(result.additions, config).double()
    return fx.GraphModule(module, result.graph), result


def test_linear_attention_stands_in_the_place_of_softmax_attention():
    runner, result = runnable(Site)
    assert not any(n.target is SDPA for n in result.graph.nodes)
    called = [n.target for n in result.graph.nodes if n.op == "call_module"]
    assert called.count("edit") == 1
    assert {"q", "k", "v", "o", "edit.query", "edit.key", "edit.value"} <= set(called)
    assert (result.additions.heads, result.additions.head_channels) == (HEADS, C // HEADS)
    assert runner(torch.randn(B, N, C).double(), torch.empty(H, W))[0].shape == (B, N, C)


def test_heads_folded_into_the_batch_give_the_same():
    x, grid = torch.randn(B, N, C, generator=torch.Generator().manual_seed(1)).double(), torch.empty(H, W)
    folded, plain = runnable(ByHand)[0], runnable(Site)[0]
    torch.testing.assert_close(folded(x, grid)[0], plain(x, grid)[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Rolls, r"a: aten\.roll\.default \(roll\) mixes image tokens between projection and attention"),
        (TwoKeys, "a: .* comes from 2 Linears of image tokens, not one"),
        (Twice, "a: captured on its own, the module runs 2 attentions that can be read, not one"),
        (TokensFirst, r"a: .* is not a Linear over \(batch, tokens, channels\)"),
        (OwnEdit, "a has an attribute 'edit' of its own, the name that added modules get"),
    ],
)
def test_what_stands_in_the_way_is_named(kind, message):
    with pytest.raises(RewriteError, match=message):
        rewritten(kind())


class ReturnsWeights(Site):
    def attend(self, q, k, v):
        q, k, v = map(self.heads, (q, k, v))
        self_attention = torch.softmax(q @ k.transpose(-1, -2), -1)
        return (self_attention @ v).transpose(1, 2).flatten(2), self_attention

    def forward(self, x):
        y, weights = self.attend(self.q(x), self.keys(x), self.v(x))
        return self.o(y), weights


def test_a_module_that_returns_its_weights_is_asked_about_them():
    with pytest.raises(RewriteError, match=r"a: captured on its own, the module runs 0 attentions .* return its attention's weights\?"):
        rewritten(ReturnsWeights())
