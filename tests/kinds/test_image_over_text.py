"""Image queries over the keys of image and text, where text has no queries: the image rows of mm-edit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edit_compile as ec
import reference
import toy
from edit_compile.designs import find_design
from edit_compile.student.site import converted_sites

CHANNELS, HEADS, TEXT = 24, 2, 6


class Attention(nn.Module):
    """Queries of the image; keys of the image and of the text, which has projections of its own, in either order."""

    def __init__(self, text_first: bool) -> None:
        super().__init__()
        self.text_first = text_first
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(CHANNELS, CHANNELS) for _ in range(4))
        self.text_k, self.text_v = (nn.Linear(TEXT, CHANNELS) for _ in range(2))

    def forward(self, image: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v, text_k, text_v = (
            x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for x in (self.to_q(image), self.to_k(image), self.to_v(image), self.text_k(text), self.text_v(text))
        )
        k, v = (torch.cat([b, a] if self.text_first else [a, b], 2) for a, b in ((k, text_k), (v, text_v)))
        if mask is not None:
            every = torch.ones(image.shape[:2], dtype=torch.bool, device=mask.device)
            mask = torch.cat([mask, every] if self.text_first else [every, mask], 1)[:, None, None]
        return self.to_out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class Painter(nn.Module):
    """Images (B, 3, H, W) and text (B, T, 6); text stays as it is."""

    def __init__(self, text_first: bool = True) -> None:
        super().__init__()
        self.patch, self.out = nn.Conv2d(3, CHANNELS, 2, stride=2), nn.ConvTranspose2d(CHANNELS, 3, 2, stride=2)
        self.attn, self.norm = Attention(text_first), nn.LayerNorm(CHANNELS)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        image = self.patch(x)
        tokens = image.flatten(2).transpose(1, 2)
        tokens = tokens + self.attn(self.norm(tokens), text, text_mask)
        return self.out(tokens.transpose(1, 2).unflatten(2, image.shape[2:]))


class Clip(Painter):
    """The same for videos (B, 3, t, H, W)."""

    def __init__(self, text_first: bool = True) -> None:
        super().__init__(text_first)
        self.patch = nn.Conv3d(3, CHANNELS, (1, 2, 2), (1, 2, 2))
        self.out = nn.ConvTranspose3d(CHANNELS, 3, (1, 2, 2), (1, 2, 2))


def inputs(grid: tuple[int, ...], padded: bool, batch: int = 2) -> dict[str, Tensor]:
    given = toy.inputs(batch, 2 * grid[-2], 2 * grid[-1], text=5, padded=padded)
    if len(grid) == 3:
        given["x"] = torch.randn(batch, 3, grid[0], 2 * grid[1], 2 * grid[2], generator=torch.Generator().manual_seed(1))
    return given


def expected(site: nn.Module, options: Any, image: np.ndarray, text: np.ndarray, counts: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """The image rows of mm-edit for one sample, row by row."""
    q, k, v = (reference.image_projection(site, options, which, image, grid) for which in range(3))
    text_k, text_v = reference.linear(site.text_k, text)[counts], reference.linear(site.text_v, text)[counts]
    rows = np.zeros((len(image), CHANNELS))
    for head in range(HEADS):
        cut = slice(head * CHANNELS // HEADS, (head + 1) * CHANNELS // HEADS)
        for i in range(len(image)):
            y, z_linear = reference.linear_row(reference.relu(q[i, cut]), reference.relu(k[:, cut]), v[:, cut])
            y_text, z_text = reference.softmax_row(q[i, cut], text_k[:, cut], text_v[:, cut])
            eta = reference.share_of_linear(site, options, head, len(image), counts.sum(), z_linear, z_text)
            rows[i, cut] = eta * y + (1 - eta) * y_text
    return reference.linear(site.to_out, rows)


CASES = [
    (Painter, True, False, {}),
    (Painter, False, True, {"eta": "ratio"}),
    (Painter, True, True, {"eta": "calibrated", "text_keys": "compressed"}),
    (Clip, False, True, {"temporal": "causal", "temporal_stride": 2}),
]


@pytest.mark.parametrize(("kind", "text_first", "padded", "config"), CASES)
def test_image_rows_are_the_formula(kind: type[Painter], text_first: bool, padded: bool, config: dict[str, Any]):
    torch.manual_seed(0)
    model = toy.shaken(kind(text_first).eval())
    grids = [(3, 5, 7), (4, 4, 2)] if kind is Clip else [(5, 7), (4, 3)]
    example = inputs(grids[0], padded)
    student = ec.linearize(model, ec.LinearizeConfig(design="mm-edit", **config), example_inputs=example)
    toy.shaken(nn.ModuleList(converted_sites(student).values()), seed=1, amount=0.2)
    (plan,) = ec.plan_of(student).sites
    assert (plan.action, plan.reason) == ("mm-edit", "image tokens attend to image tokens and others")
    assert [str(s.kind) for s in plan.key_layout.segments] == (["text", "image"] if text_first else ["image", "text"])
    seen: list[Any] = []
    student.attn.register_forward_hook(lambda module, args, output: seen.append((args, output)))
    for grid in grids:
        given = inputs(grid, padded)
        with torch.no_grad():
            output, original = student(**given), model(**given)
            with ec.teacher(student):
                taught = student(**given)
        torch.testing.assert_close(taught, original, atol=1e-5, rtol=0)
        assert not torch.allclose(output, taught, atol=1e-3)
        (image, text, mask), found = seen[-2]
        for i, rows in enumerate(found.numpy()):
            counts = mask[i].numpy() if mask is not None else np.ones(text.shape[1], dtype=bool)
            wanted = expected(student.attn, options_of(plan), image[i].double().numpy(), text[i].double().numpy(), counts, grid)
            np.testing.assert_allclose(rows, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


def options_of(plan: Any) -> Any:
    return find_design(plan.action).Options(**plan.options)


def test_image_tokens_alone_have_no_text_rows_to_compute():
    student = ec.linearize(Painter().eval(), example_inputs=inputs((5, 7), False))
    site = student.attn.edit
    assert not site.needs_original
    (plan,) = ec.plan_of(student).sites
    image_rows = 4 * CHANNELS * 5 * 35  # scores and weighted values of 35 queries over 5 keys
    edit = find_design("edit")
    channels = {f"{side}_{name}": CHANNELS for side in ("before", "after") for name in ("query", "key", "value")}
    sizes = {"heads": HEADS, "key_heads": HEADS, "head_dim": CHANNELS // HEADS, "value_dim": CHANNELS // HEADS}
    facts = ec.Site("attention", "attn", plan.query_layout, plan.key_layout, 2, channels, **sizes)
    options = options_of(plan)
    assert find_design("mm-edit").flops(facts, (5, 7), 5, options) == edit.flops(facts, (5, 7), 5, options) + image_rows
    assert not edit.accepts(facts, edit.Options()).ok


class Pooled(Painter):
    """Image queries over keys of fewer image tokens: cheaper already, and no self-attention."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        image = self.patch(x)
        tokens = image.flatten(2).transpose(1, 2)
        pooled = F.avg_pool2d(image, 2).flatten(2).transpose(1, 2)
        tokens = tokens + self.over(tokens, pooled)
        return self.out(tokens.transpose(1, 2).unflatten(2, image.shape[2:])) + 0 * text.sum()

    def __init__(self) -> None:
        super().__init__()
        self.over = Over()


class Over(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.q(x), self.k(y), self.v(y)))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_pooled_keys_are_not_the_queries_own_tokens():
    (site,) = ec.plan(Pooled().eval(), example_inputs=inputs((4, 6), False)).sites
    assert site.action == "keep"
    assert "not self-attention" in site.reason
