"""Attention to a window of the grid: against loops over pairs of tokens in float64, and what it costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from edit_compile.designs.ops.local_attention import (
    Window,
    attention_in_blocks,
    attention_to_all,
    block_products,
    flex_attention_within,
    is_block_pair,
    local_attention,
    merged,
    neighbours,
)

Grid = tuple[int, ...]


def distance(grid: Grid, window: Window, i: int, j: int) -> float:
    """Between two tokens by number, in the window's unit: below 1 is within."""
    *frames, height, width = grid
    (a, y), x = divmod(i // width, height), i % width
    (b, v), u = divmod(j // width, height), j % width
    over_time = abs(a - b) / window.frames if frames else 0
    return math.hypot(over_time, math.hypot(y - v, x - u) / window.radius)


def within(grid: Grid, window: Window, i: int, j: int) -> bool:
    return distance(grid, window, i, j) < 1 - 1e-9


def expected(q: Tensor, k: Tensor, v: Tensor, grid: Grid, window: Window, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """All pairs, those outside of windows taken out; the logarithm of no weight is minus infinity."""
    n = q.shape[2]
    weights = (q @ k.mT * scale).exp()
    if mask is not None:
        weights = weights * (mask if mask.dtype == torch.bool else mask.exp())
    weights = weights * torch.tensor([[within(grid, window, i, j) for j in range(n)] for i in range(n)])
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights @ v / total, 0), total.log()


def operands(
    grid: Grid, heads: int = 1, batch: int = 1, channels: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (channels, channels, channels + 1)
    return [torch.randn(batch, heads, math.prod(grid), c, generator=generator, dtype=torch.float64).to(dtype) for c in sizes]


def masks(kind: str, length: int, batch: int, heads: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(1)
    if kind == "none":
        return None
    if kind == "boolean":
        return torch.rand(batch, 1, 1, length, generator=generator) > 0.4
    return torch.randn(1, heads, 1, length, generator=generator, dtype=torch.float64)


images = st.tuples(st.integers(1, 10), st.integers(1, 6))
videos = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9))


def check(way: Callable[..., tuple[Tensor, Tensor]], grid: Grid, window: Window, batch: int, heads: int, mask: str, atol: float) -> None:
    q, k, v = operands(grid, heads, batch)
    by_key = masks(mask, math.prod(grid), batch, heads)
    wanted, log_total = expected(q, k, v, grid, window, 0.7, by_key)
    y, normaliser = way(q, k, v, grid, window, 0.7, by_key)
    torch.testing.assert_close(y, wanted, atol=atol, rtol=0)
    sees = log_total > -math.inf
    torch.testing.assert_close(normaliser[sees].double(), log_total[sees], atol=atol, rtol=0)
    assert (normaliser[~sees] < -1e38).all()


@settings(max_examples=30, deadline=None)
@given(
    grid=st.one_of(images, videos),
    window=st.builds(Window, st.integers(1, 12), st.integers(1, 3)),
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    mask=st.sampled_from(["none", "boolean", "additive"]),
)
def test_it_is_the_formula(grid: Grid, window: Window, batch: int, heads: int, mask: str):
    check(attention_in_blocks, grid, window, batch, heads, mask, 1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("grid", "window", "mask"), [((5, 11), Window(3), "boolean"), pytest.param((2, 3, 9), Window(4, 2), "additive", marks=pytest.mark.slow)]
)
def test_the_kernels_form_is_the_formula(grid: Grid, window: Window, mask: str):
    """To 1e-5: its masks are float32."""
    check(flex_attention_within, grid, window, 2, 2, mask, 1e-5)


@pytest.mark.parametrize("grid", [(5, 11), (2, 3, 9)])
def test_parts_are_merged_as_if_attention_had_been_to_all_at_once(grid: Grid):
    q, k, v = operands(grid, heads=2)
    window, n, text = Window(3, 2), math.prod(grid), 4
    more_k, more_v = torch.randn(1, 2, text, 3, dtype=torch.float64), torch.randn(1, 2, text, 4, dtype=torch.float64)
    counts = torch.tensor([True, False, True, True])[None, None, None]
    parts = local_attention(q, k, v, grid, window, 0.7), attention_to_all(q, more_k, more_v, counts, 0.7)
    seen = torch.tensor([[within(grid, window, i, j) for j in range(n)] for i in range(n)])
    seen = torch.cat([seen, counts[0, 0].expand(n, -1)], 1)
    scores = (q @ torch.cat([k, more_k], 2).mT * 0.7).masked_fill(~seen, -math.inf)
    for first, second in (parts, parts[::-1]):
        y, normaliser = merged(*first, *second)
        torch.testing.assert_close(y, scores.softmax(-1) @ torch.cat([v, more_v], 2), atol=1e-12, rtol=0)
        torch.testing.assert_close(normaliser, scores.logsumexp(-1, keepdim=True), atol=1e-12, rtol=0)


def test_gradients_are_those_of_the_formula():
    """Those of the normaliser, too, and where a query sees no key that counts."""
    grid, window = (3, 9), Window(2)
    q, k, v = (x.requires_grad_() for x in operands(grid, channels=2))
    mask = torch.arange(27)[None, None, None] > 10

    def both(*x: Tensor) -> tuple[Tensor, Tensor]:
        y, normaliser = attention_in_blocks(*x, grid, window, 0.7, mask)
        return y, normaliser.clamp(min=-100)

    assert torch.autograd.gradcheck(both, (q, k, v))


@pytest.mark.parametrize("window", [Window(3), Window(8)])
def test_the_cost_is_as_stated_and_linear(window: Window):
    found = []
    for grid in ((16, 16), (16, 32), (16, 48)):
        with FlopCounterMode(display=False) as counter:
            attention_in_blocks(*operands(grid, heads=2), grid, window, 1.0)
        found.append(counter.get_total_flops())
        assert found[-1] == 2 * 2 * (3 + 4) * math.prod(block_products(grid, window))
    assert found[2] - found[1] == found[1] - found[0]


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that comes about."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else (found,):
            self.numbers = max(self.numbers, each.untyped_storage().size() // each.element_size() if isinstance(each, Tensor) else 0)
        return found


def test_memory_is_linear():
    window, sizes = Window(3), []
    for grid in ((32, 32), (64, 64), (64, 128)):
        with Largest() as largest:
            attention_in_blocks(*operands(grid, dtype=torch.float32), grid, window, 1.0)
        sizes.append(largest.numbers)
        assert largest.numbers <= math.prod(grid) * window.keys * 1.3
    assert sizes[2] <= 2.1 * sizes[1] <= 2.1 * 4.1 * sizes[0]


@pytest.mark.parametrize(
    ("grid", "window"), [((20, 27), Window(6)), ((3, 9, 17), Window(9, 2)), ((8, 8), Window(2)), ((40, 9), Window(20))]
)
def test_the_kernel_visits_the_blocks_that_hold_seen_keys(grid: Grid, window: Window):
    frames, height, width = (1, *grid)[-3:]
    rows, columns = math.ceil(height / 8), math.ceil(width / 8)
    blocks = list(itertools.product(range(frames), range(rows), range(columns)))

    def sees(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        gaps = [max(0, (abs(s - t) - 1) * 8 + 1) for s, t in zip(a[1:], b[1:], strict=True)]
        return ((a[0] - b[0]) / window.frames) ** 2 + (gaps[0] ** 2 + gaps[1] ** 2) / window.radius**2 < 1 - 1e-9

    numbers, lists = neighbours((frames, height, width), window.on(grid), torch.device("cpu"))
    for own, (number, listed) in enumerate(zip(numbers, lists, strict=True)):
        assert listed[:number].tolist() == [i for i, block in enumerate(blocks) if sees(blocks[own], block)]


@pytest.mark.slow
@pytest.mark.parametrize("way", [attention_in_blocks, flex_attention_within])
@torch.no_grad()
def test_it_compiles_to_one_graph_for_all_sizes(way: Callable[..., tuple[Tensor, Tensor]]):
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def compiled(q: Tensor, k: Tensor, v: Tensor, shape: Tensor) -> tuple[Tensor, Tensor]:
        return way(q, k, v, tuple(shape.shape), Window(3), 0.5)

    for grid in ((9, 17), (20, 27), (16, 10)):
        given = operands(grid, 2, 2, dtype=torch.float32)
        found = compiled(*given, torch.empty((), device="meta").expand(grid))
        torch.testing.assert_close(found, attention_in_blocks(*given, grid, Window(3), 0.5), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_in_float16_a_query_without_keys_gives_zero():
    q, k, v = operands((3, 3), dtype=torch.float16)
    y, _ = attention_in_blocks(q, k, v, (3, 3), Window(2), 1.0, torch.zeros(1, 1, 1, 9, dtype=torch.bool))
    assert torch.equal(y, torch.zeros_like(y))


def test_what_is_the_product_of_a_block():
    assert Window(8).keys == (8 + 2 * 7) ** 2
    assert Window(8, 2).keys == 3 * (8 + 2 * 7) ** 2
    assert is_block_pair(64, 484, (32, 32), Window(8, 2))
    assert not is_block_pair(64, 485, (32, 32), Window(8, 2))
    assert is_block_pair(64, 3 * 484, (2, 32, 32), Window(8, 2))
    assert not is_block_pair(65, 65, (32, 32), Window(8))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("masked", "channels"), [(False, 32), (True, 32), (False, 64), (True, 72), (False, 128)])
def test_the_kernel_on_a_gpu_is_equal_to_the_blocks(dtype: torch.dtype, masked: bool, channels: int):
    compiled = torch.compile(
        lambda q, k, v, mask, shape: local_attention(q, k, v, tuple(shape.shape), Window(6, 2), 0.2, mask), fullgraph=True, dynamic=True
    )
    for grid in ((32, 40), (17, 51), (3, 16, 24)):
        q, k, v = (x.cuda().requires_grad_() for x in operands(grid, 2, 2, channels=channels, dtype=dtype))
        mask = masks("boolean", math.prod(grid), 2, 2).cuda() if masked else None
        shape = torch.empty((), device="meta").expand(grid)
        found, wanted = compiled(q, k, v, mask, shape), attention_in_blocks(q, k, v, grid, Window(6, 2), 0.2, mask)
        tolerance = 2e-2 if dtype == torch.bfloat16 else 5e-3
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a.float(), b.float(), atol=tolerance, rtol=tolerance)
        gradients = [torch.autograd.grad(y.float().square().sum() + z.clamp(min=-50).sum(), (q, k, v)) for y, z in (found, wanted)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a.float(), b.float(), atol=10 * tolerance, rtol=10 * tolerance)
