"""Masks: what depends on sizes alone is computed, what lets all keys take part is none, what differs by query is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edit_compile as ec
from edit_compile.passes.canonicalize import canonicalize
from edit_compile.passes.capture import capture
from edit_compile.passes.find_attention import find_attention
from edit_compile.passes.masks import mask_facts
from small_picture import Block, Picture, check_converted, image

pytestmark = pytest.mark.usefixtures("compiled_once")


class Masked(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, q, padding):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=self.make(q.shape[2], q, padding))


def facts(make):
    captured = capture(Masked(make), {"q": torch.randn(2, 4, 15, 8), "padding": torch.rand(2, 15) > 0.5})
    canonicalize(captured.graph)
    (attention,) = find_attention(captured.graph)
    return mask_facts(attention.mask, attention.node)


def places(n, q):
    return torch.arange(n, device=q.device)


def filled_above(n, q, padding):
    mask = torch.zeros(n, n, device=q.device, dtype=q.dtype)
    mask.masked_fill_(places(n, q)[:, None] < places(n, q), float("-inf"))
    return mask


def written_into_a_part(n, q, padding):
    mask = torch.zeros(n, n, device=q.device, dtype=q.dtype)
    mask[:, :2] = float("-inf")
    return mask


def true_and_padding(n, q, padding):
    return (places(n, q)[:, None] >= 0) & padding[:, None, None, :]


def causal_and_padding(n, q, padding):
    return (places(n, q)[:, None] >= places(n, q)) & padding[:, None, None, :]


MASKS = {
    "ones": (lambda n, q, p: torch.ones(n, n, dtype=torch.bool, device=q.device), ("none", False)),
    "zeros to add": (lambda n, q, p: torch.zeros(1, 1, n, n, device=q.device, dtype=q.dtype), ("none", False)),
    "never negative": (lambda n, q, p: (places(n, q)[:, None] >= 0).expand(n, n), ("none", False)),
    "either": (lambda n, q, p: (places(n, q)[:, None] < n) | (places(n, q)[None] == 3), ("none", False)),
    "by batch": (lambda n, q, p: (places(n, q)[:, None] >= 0)[None, None].expand(q.shape[0], -1, n, n), ("none", False)),
    "lower triangle": (lambda n, q, p: torch.ones(n, n, dtype=torch.bool, device=q.device).tril(), ("none", True)),
    "minus infinity above": (filled_above, ("none", True)),
    "written into": (written_into_a_part, ("by_key", False)),
    "all but the first key": (lambda n, q, p: (places(n, q) > 0).expand(n, n), ("by_key", False)),
    "a band": (lambda n, q, p: (places(n, q)[:, None] - places(n, q)).abs() < 20, ("by_query", False)),
    "padding": (lambda n, q, p: p[:, None, None, :], ("by_key", False)),
    "true and padding": (true_and_padding, ("by_key", False)),
    "causal and padding": (causal_and_padding, ("by_query", False)),
}


@pytest.mark.parametrize("name", MASKS)
def test_what_a_mask_does_is_told(name):
    make, expected = MASKS[name]
    assert facts(make) == expected


class GivenMask(Picture):
    """Makes a mask of the tokens' number for its blocks."""

    def __init__(self, make):
        super().__init__(WithMask)
        self.make = make

    def run(self, y):
        mask = self.make(torch.arange(y.shape[1], device=y.device))
        for block in self.blocks:
            y = block(y, mask)
        return y


class WithMask(Block):
    def forward(self, x, mask):
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


def test_a_site_whose_mask_is_true_everywhere_is_converted():
    check_converted(GivenMask(lambda at: (at[:, None] >= 0) & (at[None] < len(at))), "edit")


class Padded(Picture):
    """Leaves tokens out as keys, the first always; `whole` leaves them out as queries, too."""

    def __init__(self, whole):
        super().__init__(WithMask)
        self.whole = whole

    def run(self, y):
        taken = (y[..., 0] > -0.5) & (torch.arange(y.shape[1], device=y.device) > 0)
        mask = taken[:, None, :, None] & taken[:, None, None, :] if self.whole else taken[:, None, None, :]
        return self.blocks[0](y, mask)


def test_queries_that_are_masked_as_a_whole_do_not_change_what_the_others_see():
    inputs, outputs = image(2, 6, 10), []
    for whole in (False, True):
        model = Padded(whole).eval()
        student = ec.linearize(model, example_inputs=inputs)
        assert [site.mask for site in ec.plan(model, example_inputs=inputs).sites] == ["by_key"]
        torch.manual_seed(0)
        for name, parameter in student.named_parameters():
            if ".edit." in name:
                torch.nn.init.normal_(parameter, std=0.1)
        with torch.no_grad():
            outputs.append(student(**inputs))
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=0)


class ByRank(WithMask):
    def forward(self, x, mask):
        return super().forward(x, mask[:, None, None] if mask.ndim == 2 else mask)


class GivenToBlocks(Picture):
    def __init__(self):
        super().__init__(ByRank)

    def forward(self, x, mask):
        self.mask = mask
        return super().forward(x)

    def run(self, y):
        return self.blocks[1](self.blocks[0](y, self.mask), self.mask)


def test_a_mask_of_another_rank_goes_another_way_and_is_refused():
    model, inputs = GivenToBlocks().eval(), image(2, 6, 10)
    mask = torch.arange(60).expand(2, -1) < 40
    student = ec.linearize(model, example_inputs={**inputs, "mask": mask})
    with pytest.raises(ec.RewriteError, match=r"blocks\.0: was converted for inputs without this: mask\.ndim != 2"):
        student(**inputs, mask=mask[:, None, None])
    student(**inputs, mask=mask)


def test_a_causal_mask_is_called_causal():
    plan = ec.plan(GivenMask(lambda at: at[:, None] >= at[None]), example_inputs=image(2, 6, 10))
    assert {(site.action, site.reason) for site in plan.sites} == {("keep", "causal attention")}
