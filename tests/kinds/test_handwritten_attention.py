"""Attention written by hand: rewritten in whichever form it is softmax attention, kept for the true reason where it is something else."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edit_compile as ec
from edit_compile.passes.canonicalize import canonicalize
from edit_compile.passes.capture import capture
from edit_compile.passes.find_attention import find_attention
from hand_built import run
from small_picture import Block, Picture, check_converted, reasons

pytestmark = pytest.mark.usefixtures("compiled_once")

# ------------------------------------------------------------------ softmax attention


def by(q, k):
    return q.shape[-1] ** -0.5


def chunked(q, k, v):
    return torch.cat([(part @ k.mT * by(q, k)).softmax(-1) @ v for part in q.chunk(3, 2)], 2)


def chunked_and_normalized_after(q, k, v):
    weights = (q @ k.mT * by(q, k)).exp()
    return (weights @ v) / weights.sum(-1, keepdim=True)


def by_exponentials(q, k, v):
    weights = torch.exp(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]))
    return (weights / (weights.sum(-1, keepdim=True) + 1e-6)) @ v


def by_log_sum(q, k, v):
    scores = torch.einsum("bhxc,bhyc->bhxy", q, k) * by(q, k)
    return torch.exp(scores - scores.logsumexp(-1, keepdim=True)) @ v


def stable_exponentials(q, k, v):
    scores = (q @ k.mT).mul(by(q, k))
    weights = (scores - scores.max(-1, keepdim=True).values).exp()
    return torch.einsum("bhij,bhjd->bhid", weights / weights.sum(dim=-1, keepdim=True), v)


def folded_heads(q, k, v):
    b, h, n, d = q.shape
    q, k, v = (t.reshape(b * h, n, d) for t in (q, k, v))
    scores = torch.baddbmm(torch.empty(b * h, n, n, dtype=q.dtype, device=q.device), q, k.transpose(1, 2), beta=0, alpha=d**-0.5)
    return torch.bmm(scores.softmax(-1), v).view(b, h, n, d)


def mask_over_folded_heads(q, k, v):
    b, h, n, d = q.shape
    scores = torch.bmm(q.reshape(b * h, n, d) * d**-0.5, k.reshape(b * h, n, d).transpose(1, 2))
    scores = scores.view(b, h, n, n) + torch.zeros(b, 1, n, n, dtype=q.dtype, device=q.device)
    return torch.bmm(scores.view(b * h, n, n).softmax(-1), v.reshape(b * h, n, d)).view(b, h, n, d)


def heads_last(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, N, H, D)
    weights = torch.einsum("bnhd,bmhd->bnmh", q * by(q, k), k).softmax(2)
    return torch.einsum("bnmh,bmhd->bnhd", weights, v).transpose(1, 2)


def channels_first(q, k, v):
    q, k, v = (t.transpose(-2, -1) for t in (q, k, v))  # (B, H, D, N)
    weights = F.softmax(q.transpose(-2, -1) @ k / 2.0, dim=-1)
    return (v @ weights.transpose(-2, -1)).transpose(-2, -1)


def keys_times_queries(q, k, v):
    weights = (k @ q.mT * 0.3).softmax(-2)  # keys are rows
    return weights.mT @ v


def in_float32(q, k, v):
    weights = torch.softmax((q @ k.mT).float() * by(q, k), dim=-1, dtype=torch.float32)
    return weights.to(v.dtype) @ v


def both_scaled(q, k, v):
    root = q.shape[-1] ** 0.25
    return F.dropout(torch.matmul(q / root, (k / root).swapaxes(-2, -1)).softmax(-1), 0.1, training=False) @ v


def added_in_place(q, k, v):
    scores = q @ k.mT
    scores *= by(q, k)
    scores += torch.zeros(1, 1, 1, k.shape[2], device=q.device, dtype=q.dtype)
    scores -= scores.amax(-1, keepdim=True)
    weights = scores.softmax(-1)
    weights = F.dropout(weights, 0.0, training=False, inplace=True)
    return weights @ v


def every_key_taken(q, k, v):
    taken = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    scores = (q @ k.mT * by(q, k)).masked_fill(~taken, torch.finfo(q.dtype).min)
    return torch.where(taken, scores, torch.full((), -1e9, device=q.device, dtype=q.dtype)).softmax(-1) @ v


def one_key_for_all_heads(q, k, v):
    scores = torch.einsum("bhid,bjd->bhij", q, k[:, 0]) * by(q, k)
    return torch.einsum("bhij,bjd->bhid", scores.softmax(-1), v[:, 0])


def zeroed_after(q, k, v):
    return torch.nan_to_num((q @ k.mT * by(q, k)).softmax(-1)) * 1.0 @ v


SOFTMAX = [
    chunked, chunked_and_normalized_after, by_exponentials, by_log_sum, stable_exponentials, folded_heads, mask_over_folded_heads,
    heads_last, channels_first, keys_times_queries, in_float32, both_scaled, added_in_place, one_key_for_all_heads,
    zeroed_after,
]  # fmt: skip


class Attend(nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.attend = attend

    def forward(self, q, k, v):
        return self.attend(q, k, v)


@pytest.mark.parametrize("attend", SOFTMAX, ids=lambda function: function.__name__)
def test_any_form_becomes_one_node_of_the_same_value(attend):
    sizes = {"q": torch.randn(2, 4, 15, 8), "k": torch.randn(2, 4, 15, 8), "v": torch.randn(2, 4, 15, 8)}
    captured = capture(Attend(attend), sizes, symbolic=False)
    canonicalize(captured.graph)
    (attention,) = find_attention(captured.graph)
    assert attention.node.meta["val"].ndim == 4
    for node in captured.graph.nodes:
        if "device" in node.kwargs:
            dtype = node.kwargs.get("dtype")
            node.kwargs = {**node.kwargs, "device": "cpu", "dtype": torch.float32 if dtype is torch.bfloat16 else dtype}
    inputs = [torch.randn(2, 4, 15, 8) for _ in "qkv"]
    (found,) = run(captured.graph, *inputs)
    torch.testing.assert_close(found, attend(*inputs), atol=1e-5, rtol=1e-4)


class TwoForms(Picture):
    """A picture whose two blocks attend in different forms."""

    def __init__(self, *forms):
        blocks = iter(forms)
        super().__init__(lambda: Block(next(blocks)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "forms",
    [
        (chunked, folded_heads),
        (chunked_and_normalized_after, zeroed_after),
        (by_log_sum, heads_last),
        (channels_first, added_in_place),
        (every_key_taken, one_key_for_all_heads),
    ],
)
def test_models_with_such_attention_are_converted(forms):
    check_converted(TwoForms(*forms), "edit")


class Cosine(Block):
    """As in Swin v2: queries and keys of length one, a learned temperature of every head that is kept from growing."""

    def __init__(self):
        super().__init__(None)
        self.temperature = nn.Parameter(torch.full((4, 1, 1), 2.0))

    def attend(self, q, k, v):
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return (scores * torch.clamp(self.temperature, max=math.log(100.0)).exp()).softmax(dim=-1) @ v


class Gated(Block):
    """A gate of every head multiplies the weights; a temperature by query divides the scores."""

    def __init__(self):
        super().__init__(None)
        self.gate = nn.Parameter(torch.rand(4, 1, 1))

    def attend(self, q, k, v):
        weights = ((q @ k.mT) / (1 + q.square().mean(-1, keepdim=True))).softmax(-1)
        return (weights * self.gate) @ v


class DroppedInPlace(Block):
    def __init__(self):
        super().__init__(None)
        self.drop = nn.Dropout(0.2, inplace=True)

    def attend(self, q, k, v):
        return torch.einsum("...ij,...jd->...id", self.drop((q @ k.mT * by(q, k)).softmax(-1)), v)


@pytest.mark.parametrize("blocks", [(Cosine, Gated), (DroppedInPlace, Cosine)])
def test_factors_that_are_learned_stay(blocks):
    classes = iter(blocks)
    check_converted(Picture(lambda: next(classes)()), "edit")


# ------------------------------------------------------------------ other attention


def soft_cap(q, k, v):
    return (torch.tanh(q @ k.mT * by(q, k) / 50) * 50).softmax(-1) @ v


def sigmoid(q, k, v):
    return torch.sigmoid(q @ k.mT * by(q, k) - math.log(60)) @ v


def relu_squared(q, k, v):
    return torch.einsum("bhij,bhjd->bhid", F.relu(torch.einsum("bhid,bhjd->bhij", q, k)) ** 2 / 60, v)


def no_weights_but_scores(q, k, v):
    return (q @ k.mT * by(q, k)) @ v


def over_queries(q, k, v):
    return (q @ k.mT * by(q, k)).softmax(-2) @ v


def weights_used_twice(q, k, v):
    weights = (q @ k.mT * by(q, k)).softmax(-1)
    return weights @ v * weights.amax(-1, keepdim=True)


def linear(q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q @ (k.mT @ v)) / (q @ k.sum(-2, keepdim=True).mT)


def linear_by_einsum(q, k, v):
    context = torch.einsum("bhnd,bhne->bhde", k.softmax(-2), v)
    return torch.einsum("bhnd,bhde->bhne", q.softmax(-1), context)


def between_channels(q, k, v):
    weights = (F.normalize(q, dim=-2).mT @ F.normalize(k, dim=-2)).softmax(-1)
    return v @ weights.mT


OTHERS = {
    soft_cap: "go through tanh before the softmax: not the softmax of a scaled product",
    sigmoid: "attention whose weights are no softmax of the scores: they are made by sigmoid",
    relu_squared: "attention whose weights are no softmax of the scores: they are made by relu",
    no_weights_but_scores: "attention whose weights are no softmax of the scores: they are the scores themselves",
    over_queries: "sums over another dimension than the softmax",
    weights_used_twice: "used for more than the sum of the values",
    linear: "already linear attention",
    linear_by_einsum: "already linear attention",
    between_channels: "attention between channels",
}


@pytest.mark.parametrize("first", range(0, len(OTHERS), 2))
def test_other_attention_is_kept_and_called_what_it_is(first):
    forms = (list(OTHERS) * 2)[first : first + 2]
    found = reasons(TwoForms(*forms))
    assert {path: OTHERS[form] in found[path] for path, form in zip(("blocks.0", "blocks.1"), forms, strict=True)} == {
        "blocks.0": True,
        "blocks.1": True,
    }, found


def by_distance(q, k, v):
    return torch.exp(-torch.cdist(q, k)) @ v / 60


def additive(q, k, v):
    return torch.tanh(q[:, :, :, None] + k[:, :, None]).sum(-1).sigmoid() @ v


def number_by_number(q, k, v):
    weights = ((q[:, :, :, None] * k[:, :, None]).sum(-1) * by(q, k)).sigmoid()
    return (weights[..., None] * v[:, :, None]).sum(-2)


def two_forms_at_once(q, k, v):
    return soft_cap(q, k, v) + sigmoid(q, k, v)


def test_tokens_may_be_paired_without_a_product():
    found = reasons(TwoForms(by_distance, additive))
    assert ["cdist, exp" in found["blocks.0"], "tanh, sigmoid" in found["blocks.1"]] == [True, True], found


def test_each_form_of_one_module_is_listed_once():
    plan = ec.plan(TwoForms(two_forms_at_once, number_by_number).eval(), example_inputs={"x": torch.randn(2, 4, 12, 20)})
    assert [site.path for site in plan.sites] == ["blocks.0", "blocks.0", "blocks.1"]
    assert ["tanh" in plan.sites[0].reason, *("made by sigmoid" in site.reason for site in plan.sites[1:])] == [True, True, True], plan


class TalkingHeads(Block):
    def __init__(self):
        super().__init__(None)
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

    def attend(self, q, k, v):
        weights = self.before((q @ k.mT * by(q, k)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        return self.after(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


class HeadsByTable(Block):
    def __init__(self):
        super().__init__(None)
        self.table = nn.Parameter(torch.rand(4, 4))

    def attend(self, q, k, v):
        return torch.einsum("bhij,hg->bgij", (q @ k.mT * by(q, k)).softmax(-1), self.table) @ v


class Biased(Block):
    """A bias of every pair of places, looked up in a learned table."""

    def __init__(self):
        super().__init__(None)
        self.bias = nn.Parameter(torch.randn(4, 400))

    def attend(self, q, k, v):
        places = torch.arange(q.shape[2], device=q.device)
        bias = self.bias[:, (places[:, None] - places[None] + 200)]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def test_weights_or_scores_that_more_acts_on_are_kept_for_it():
    blocks = iter([TalkingHeads, HeadsByTable])
    assert all("talking heads" in found for found in reasons(Picture(lambda: next(blocks)())).values())
    assert all("a learned bias, which differs from query to query" in found for found in reasons(Picture(Biased)).values())


def test_a_table_that_mixes_tokens_is_no_attention():
    """As in MLP-Mixer: beside attention it is not listed."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.table = Block(), nn.Parameter(torch.randn(60, 60))

        def forward(self, x):
            return self.block(x) + self.table @ x

    plan = ec.plan(Picture(Mixed), example_inputs={"x": torch.randn(2, 4, 12, 20)})
    assert [site.path for site in plan.sites] == ["blocks.0.block", "blocks.1.block"]
