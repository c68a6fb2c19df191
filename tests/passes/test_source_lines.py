"""A refusal names the operation that stands in the way, and the line of the model's source that it comes from."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import edit_compile as ec
from edit_compile.passes.graph_walk import path_in_package, source_line

CHANNELS, HEADS = 16, 2


class Causal(nn.Module):
    """A query sees the keys up to its own position only."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in self.to_qkv(tokens).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.to_out(y.transpose(1, 2).flatten(2))


class Rolled(Causal):
    """Every key is its neighbour's."""

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in self.to_qkv(tokens).chunk(3, -1))
        k = k.roll(1, 2)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(y.transpose(1, 2).flatten(2))


class Within(nn.Module):
    """Attention within rows: the columns alone are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = tokens.unflatten(1, (5, 7)).flatten(0, 1)
        q, k, v = (x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in self.to_qkv(rows).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(y.transpose(1, 2).flatten(2)).unflatten(0, (-1, 5)).flatten(1, 2)


class Denoiser(nn.Module):
    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.into, self.attn, self.out = nn.Linear(3, CHANNELS), attention(), nn.Linear(CHANNELS, 3)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.into(image.flatten(2).transpose(1, 2))
        return self.out(tokens + self.attn(tokens)).transpose(1, 2).unflatten(2, image.shape[2:])


def line_of(kind: type[nn.Module], code: str) -> str:
    lines, first = inspect.getsourcelines(kind)
    return f"{Path(__file__).name}:{first + next(i for i, line in enumerate(lines) if code in line)} ({code})"


@pytest.mark.parametrize(
    ("kind", "node", "code"),
    [
        (Rolled, "roll", "k = k.roll(1, 2)"),
        (Causal, "scaled_dot_product_attention", "y = F.scaled_dot_product_attention(q, k, v, is_causal=True)"),
        (Within, "scaled_dot_product_attention", "y = F.scaled_dot_product_attention(q, k, v)"),
    ],
    ids=["found in the site's graph", "found by the design", "found in the model's graph"],
)
def test_a_refusal_shows_the_operation_and_its_line(kind, node, code):
    (site,) = (plan := ec.plan(Denoiser(kind), example_inputs={"image": torch.zeros(2, 3, 5, 7)}))
    assert str(Path(__file__).parent) not in plan.to_json()
    assert (site.action, site.refusal.node, site.refusal.source) == ("keep", node, line_of(kind, code))
    assert f"refused at {node}, {line_of(kind, code)}" in str(plan)


def traced(*frames: tuple[str, str, str]) -> fx.Node:
    """A node whose trace has these files, lines and code."""
    node = fx.Graph().placeholder("x")
    node.meta["stack_trace"] = "".join(f'  File "{file}", line {line}, in forward\n{code}' for file, line, code in frames)
    return node


def test_the_innermost_frame_outside_torch_counts():
    """A folder that happens to be named torch is not torch's."""
    inner = (f"{torch.__path__[0]}/nn/functional.py", "9", "    return torch.relu(x)\n")
    outer, own = ("/home/me/torch/model.py", "3", "    y = block(x)\n"), ("/home/me/torch/block.py", "7", "    F.relu(x)\n")
    assert source_line(traced(outer, own, inner)) == "block.py:7 (F.relu(x))"
    assert source_line(traced(("/tmp/a.py", "3", ""), ("/tmp/b.py", "5", ""))) == "b.py:5 (?)"
    assert source_line(traced(inner)) is None
    assert source_line(fx.Graph().placeholder("x")) is None


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("/home/me/.venv/lib/python3.11/site-packages/diffusers/models/attention.py", "diffusers/models/attention.py"),
        ("/usr/lib/python3/dist-packages/diffusers/models/attention.py", "diffusers/models/attention.py"),
        ("/srv/site-packages/old/site-packages/mine.py", "mine.py"),
        ("/tmp/ipykernel_7/12.py", "12.py"),
        ("<string>", "<string>"),
        ("block.py", "block.py"),
    ],
)
def test_a_source_file_is_named_without_the_folders_of_the_machine(file, expected):
    assert path_in_package(file) == expected


def test_a_file_of_a_package_that_is_not_installed_is_named_from_the_package_on(tmp_path):
    inner = tmp_path / "checkout" / "mine" / "models"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent):
        (folder / "__init__.py").touch()
    assert path_in_package(str(inner / "block.py")) == "mine/models/block.py"
    assert path_in_package(str(inner.parent.parent / "script.py")) == "script.py"
