"""Softmax attention of image tokens to those around them on the grid, in time and memory linear in their number.

Two ways to the same numbers: FlexAttention, whose kernel exists where torch.compile makes one for CUDA, and elsewhere square blocks
of queries, each against a copy of the keys of the block and its surroundings. Both cut the grid into blocks of `SIDE` x `SIDE`.

Shape suffixes: B batch, H heads, N image tokens, D and E channels of a head, n blocks, S queries of a block, M keys that it looks at.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from edit_compile.designs.ops.linear_attention import NO_WEIGHT, at_least_float32, attention_with_normaliser, softmax_with_normaliser

SIDE = 8  # of a block; the waste of larger ones is in the keys that no query of theirs sees, that of smaller ones in copies
QUERIES = SIDE * SIDE  # of a block
_SMALLEST_FLEX_HEAD = 16
_FLEX_TILES: Any = {  # of a block at most: the kernel's own choice may be larger
    "BLOCK_M": QUERIES,
    "BLOCK_N": QUERIES,
    "bwd_BLOCK_M1": QUERIES,
    "bwd_BLOCK_N1": QUERIES,
    "bwd_BLOCK_M2": QUERIES,
    "bwd_BLOCK_N2": QUERIES,
    "FORCE_USE_FLEX_ATTENTION": True,  # not the kernel for few queries, which has other tiles
}

Grid3 = tuple[int, int, int]


class Window(NamedTuple):
    """Which tokens a token sees: those within an ellipsoid around it, (dt / frames)^2 + (dy^2 + dx^2) / radius^2 < 1.

    In the token's own frame that is the circle of all tokens at a Euclidean distance below the radius (CLEAR, arXiv 2412.16112).
    """

    radius: int
    frames: int = 1

    @property
    def reach(self) -> Grid3:
        """By how many frames, rows and columns the farthest tokens are away."""
        return self.frames - 1, self.radius - 1, self.radius - 1

    @property
    def keys(self) -> int:
        """M, the tokens of a block and its surroundings."""
        return math.prod(side + 2 * far for side, far in zip((1, SIDE, SIDE), self.reach, strict=True))

    def sees(self, dt: Tensor, dy: Tensor, dx: Tensor) -> Tensor:
        """Say which offsets are within the window."""
        r, f = self.radius**2, self.frames**2
        return dt**2 * r + (dy**2 + dx**2) * f < r * f

    def on(self, grid: Sequence[int]) -> Window:
        """Return the window on a grid: there is one frame if the grid is (h, w)."""
        return self if len(grid) == 3 else self._replace(frames=1)


def block_pairs(grid: Sequence[int], window: Window) -> int:
    """Count the pairs of a query and a key whose scores are computed in blocks, on a grid (h, w) or (t, h, w)."""
    frames, height, width = _in_frames(grid)
    return frames * _ceil(height) * _ceil(width) * QUERIES * window.on(grid).keys


def is_block_pair(rows: int, columns: int, grid: Sequence[int], window: Window) -> bool:
    """Say whether a product of so many image tokens by so many is one of the queries of a block by its keys, or smaller."""
    return min(rows, columns) <= QUERIES and max(rows, columns) <= window.on(grid).keys


def local_attention(
    q_BHND: Tensor, k_BHND: Tensor, v_BHNE: Tensor, grid: Sequence[int], window: Window, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute softmax attention of every image token to those within a window around it.

    Args:
        grid: (h, w) or (t, h, w), row-major, of N positions.
        scale: of the scores.
        mask: by key, boolean or to add to the scores, broadcastable to (B, H, 1, N).

    Returns:
        y, (B, H, N, E), in V's type, and the logarithm of the normaliser, (B, H, N, 1), in float32 or higher, for `merged`. Where a
        query sees no key that counts, y is zero and weighs nothing.
    """
    way = flex_attention_within if _has_flex_kernel(q_BHND, v_BHNE) else attention_in_blocks
    return way(q_BHND, k_BHND, v_BHNE, grid, window, scale, mask)


def attention_in_blocks(
    q_BHND: Tensor, k_BHND: Tensor, v_BHNE: Tensor, grid: Sequence[int], window: Window, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `local_attention` with plain matrix products, of `block_pairs` pairs."""
    window, frames = window.on(grid), _in_frames(grid)
    seen_nM, exists_nM = _around_blocks(frames, window.reach, q_BHND.device)
    scores_BHnSM = _taken(q_BHND * scale, _own(seen_nM, window)) @ _taken(k_BHND, seen_nM).transpose(-1, -2)
    dtype, counts_nSM = at_least_float32(scores_BHnSM), exists_nM[:, None] & _near(window, q_BHND.device)
    bias = torch.zeros((), dtype=dtype, device=q_BHND.device)
    if mask is not None:
        bias = _taken(_key_bias(q_BHND, mask, dtype), seen_nM).transpose(-1, -2)
    scores_BHnSM = scores_BHnSM.to(dtype) + torch.where(counts_nSM, bias, float("-inf"))
    y, normaliser = softmax_with_normaliser(scores_BHnSM, _taken(v_BHNE, seen_nM))
    where_N = _places_in_blocks(frames, q_BHND.device)
    return _from_blocks(y, where_N), _from_blocks(normaliser, where_N)


def flex_attention_within(
    q_BHND: Tensor, k_BHND: Tensor, v_BHNE: Tensor, grid: Sequence[int], window: Window, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `local_attention` with FlexAttention: a kernel if it is compiled, all pairs of tokens if not."""
    window, frames = window.on(grid), _in_frames(grid)
    own_nS, exists_nS = _around_blocks(frames, (0, 0, 0), q_BHND.device)
    q, k, v = (_taken(x, own_nS).flatten(2, 3) for x in (q_BHND, k_BHND, v_BHNE))
    bias = None if mask is None else _taken(_key_bias(q_BHND, mask, torch.float32), own_nS).flatten(2)
    y, normaliser = _flex(q, k, v, bias, scale, _block_mask(own_nS, exists_nS, frames, window))
    where_N = _places_in_blocks(frames, q.device)
    return y.index_select(2, where_N), normaliser.index_select(2, where_N)


def weight_within(weights_BHN1: Tensor, grid: Sequence[int], window: Window) -> Tensor:
    """Sum up the weights of the tokens that each token sees, (B, H, N, 1)."""
    frames, window = _in_frames(grid), window.on(grid)
    seen_nM, exists_nM = _around_blocks(frames, window.reach, weights_BHN1.device)
    counts_nSM = exists_nM[:, None] & _near(window, weights_BHN1.device)
    within = torch.where(counts_nSM, _taken(weights_BHN1, seen_nM).transpose(-1, -2), 0).sum(-1, keepdim=True)
    return _from_blocks(within, _places_in_blocks(frames, weights_BHN1.device))


def attention_to_all(q_BHND: Tensor, k_BHPD: Tensor, v_BHPE: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Compute softmax attention to all keys, with the logarithm of its normaliser as `local_attention` has it."""
    if k_BHPD.shape[2] > 0 and _has_flex_kernel(q_BHND, v_BHPE):
        bias = None if mask is None else _key_bias(k_BHPD, mask, torch.float32).flatten(2)
        return _flex(q_BHND, k_BHPD, v_BHPE, bias, scale, None)
    return attention_with_normaliser(q_BHND, k_BHPD, v_BHPE, mask, scale)


def merged(y: Tensor, normaliser: Tensor, other: Tensor, its_normaliser: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention to some keys with attention to others, as if it had been to all of them at once.

    Args:
        normaliser, its_normaliser: the logarithms of the normalisers of `y` and of `other`.
    """
    share = torch.sigmoid(its_normaliser - normaliser).to(y.dtype)
    return torch.lerp(y, other, share.expand_as(y)), torch.logaddexp(normaliser, its_normaliser)


# ------------------------------------------------------------------ blocks


def _in_frames(grid: Sequence[int]) -> Grid3:
    frames, height, width = (1, *grid)[-3:]
    return frames, height, width


def _ceil(size: int) -> int:
    return (size + SIDE - 1) // SIDE


def _around_blocks(grid: Grid3, reach: Grid3, device: torch.device) -> tuple[Tensor, Tensor]:
    """Number the tokens of every block and those so far around it, (n, M), and say which exist; others have the number of one that does."""
    frames, height, width = grid
    rows, columns = _ceil(height), _ceil(width)
    block = torch.arange(frames * rows * columns, device=device)[:, None, None, None]
    t, y, x = (torch.arange(-far, side + far, device=device) for side, far in zip((1, SIDE, SIDE), reach, strict=True))
    t = block // (rows * columns) + t[:, None, None]
    y = block // columns % rows * SIDE + y[:, None]
    x = block % columns * SIDE + x
    exists = (t >= 0) & (t < frames) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    number = (t.clamp(0, frames - 1) * height + y.clamp(0, height - 1)) * width + x.clamp(0, width - 1)
    return number.flatten(1), exists.flatten(1)


def _taken(x_BHNC: Tensor, numbers_nM: Tensor) -> Tensor:
    """Copy the tokens of these numbers, (B, H, n, M, C)."""
    taken: Tensor = torch.unflatten(x_BHNC.index_select(2, numbers_nM.flatten()), 2, numbers_nM.shape)
    return taken


def _own(seen_nM: Tensor, window: Window) -> Tensor:
    """Return the numbers of the tokens of every block, (n, S), among those that it looks at."""
    t, y, x = window.reach
    seen: Tensor = torch.unflatten(seen_nM, 1, (1 + 2 * t, SIDE + 2 * y, SIDE + 2 * x))
    return seen[:, t, y : y + SIDE, x : x + SIDE].flatten(1)


def _places_in_blocks(grid: Grid3, device: torch.device) -> Tensor:
    """Return where every token is in the sequence of all blocks, (N,)."""
    t, y, x = (torch.arange(size, device=device) for size in grid)
    block = (t[:, None, None] * _ceil(grid[1]) + y[:, None] // SIDE) * _ceil(grid[2]) + x // SIDE
    return (block * QUERIES + y[:, None] % SIDE * SIDE + x % SIDE).flatten()


def _from_blocks(x_BHnSC: Tensor, where_N: Tensor) -> Tensor:
    """Put blocks together again, (B, H, N, C)."""
    return x_BHnSC.flatten(2, 3).index_select(2, where_N)


def _near(window: Window, device: torch.device) -> Tensor:
    """Say which keys of its surroundings each query of a block sees, (S, M)."""
    own = torch.arange(SIDE, device=device)
    frames, rows, columns = (torch.arange(-far, side + far, device=device) for side, far in zip((1, SIDE, SIDE), window.reach, strict=True))
    dy = rows[None, None, None, :, None] - own[:, None, None, None, None]
    dx = columns[None, None, None, None, :] - own[None, :, None, None, None]
    return window.sees(frames[None, None, :, None, None], dy, dx).flatten(2).flatten(0, 1)


def _key_bias(like: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a mask by key adds to the scores, as a channel of the keys, (B or 1, H or 1, N, 1)."""
    bias = torch.where(mask, 0.0, float("-inf")) if mask.dtype == torch.bool else mask
    return bias.to(dtype).expand(-1, -1, -1, like.shape[2]).transpose(-1, -2)


# ------------------------------------------------------------------ FlexAttention


def _has_flex_kernel(q_BHND: Tensor, v_BHNE: Tensor) -> bool:
    compiles = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    heads_fit = min(q_BHND.shape[-1], v_BHNE.shape[-1]) >= _SMALLEST_FLEX_HEAD
    return compiles and q_BHND.device.type == "cuda" and q_BHND.dtype != torch.float64 and heads_fit


def _flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, seen: BlockMask | None) -> tuple[Tensor, Tensor]:
    """Call FlexAttention with what is added to the scores of each key, (B or 1, H or 1, keys)."""
    score = None
    if bias is not None:
        added = bias.expand(q.shape[0], q.shape[1], -1)

        def score(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + added[b, h, j]

    y, beside = flex_attention(
        q, k, v, score, seen, scale, kernel_options=_FLEX_TILES if seen is not None else None, return_aux=AuxRequest(lse=True)
    )
    assert beside.lse is not None
    return y, beside.lse.clamp(min=NO_WEIGHT).unsqueeze(-1)


def _block_mask(own_nS: Tensor, exists_nS: Tensor, grid: Grid3, window: Window) -> BlockMask:
    """List which blocks each block's queries see; as seeing is mutual, they are those whose queries see the block's keys."""
    _, height, width = grid
    number, exists = own_nS.flatten(), exists_nS.flatten()
    frame, row, column = number // (height * width), number // width % height, number % width

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return exists[j] & window.sees(frame[i] - frame[j], row[i] - row[j], column[i] - column[j])

    count, seen = (x[None, None] for x in neighbours(grid, window, own_nS.device))
    length = len(number)
    return BlockMask((length, length), count, seen, None, None, count, seen, None, None, (QUERIES, QUERIES), sees)


def neighbours(grid: Grid3, window: Window, device: torch.device) -> tuple[Tensor, Tensor]:
    """Count the blocks that each block's queries may see, (n,), and list them first, (n, as many as there are at most)."""
    frames, rows, columns = grid[0], _ceil(grid[1]), _ceil(grid[2])
    index = torch.arange(frames * rows * columns, device=device)[:, None]
    dt, dy, dx = torch.tensor(_offsets_of_blocks(window), device=device).unbind(-1)
    t, y, x = index // (rows * columns) + dt, index // columns % rows + dy, index % columns + dx
    inside = (t >= 0) & (t < frames) & (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
    listed = torch.where(inside, (t * rows + y) * columns + x, len(index)).sort(-1).values.clamp(max=len(index) - 1)
    return inside.sum(-1).int(), listed.int()


def _offsets_of_blocks(window: Window) -> list[Grid3]:
    """List by how many frames, rows and columns of blocks those are away of which any token is within the window of any of a block."""
    ranges = [range(-math.ceil(far / side), math.ceil(far / side) + 1) for far, side in zip(window.reach, (1, SIDE, SIDE), strict=True)]
    r, f = window.radius**2, window.frames**2
    return [(t, y, x) for t, y, x in itertools.product(*ranges) if t**2 * r + (_gap(y) ** 2 + _gap(x) ** 2) * f < r * f]


def _gap(blocks: int) -> int:
    """Return the distance of the nearest tokens of two blocks in a row, so many blocks away."""
    return max(0, (abs(blocks) - 1) * SIDE + 1)
