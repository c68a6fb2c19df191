"""Softmax attention of image tokens to those around them on the grid, in time and memory linear in their number.

Two ways to the same numbers: FlexAttention, whose kernel exists where torch.compile makes one for CUDA, and elsewhere square blocks
of queries, each against a copy of the keys of the block and its surroundings. Both cut the grid into blocks of `SIDE` x `SIDE`.

Shape suffixes: B batch, H heads, N image tokens, D and E channels of a head, n blocks, S queries of a block, M keys that it looks at.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from edit_compile.designs.ops.key_masks import NO_WEIGHT, at_least_float32, key_bias
from edit_compile.designs.ops.linear_attention import attention_with_normaliser, exact_scores, softmax_with_normaliser
from edit_compile.torch_internals import FLEX_TILES_FIT_BLOCKS, is_exporting

SIDE = 8  # of a block; the waste of larger ones is in the keys that no query of theirs sees, that of smaller ones in copies
QUERIES = SIDE * SIDE  # of a block
MOST_SCORES = 2**25  # that are in memory at a time, unless compiled
_SMALLEST_FLEX_HEAD = 16
_FLEX_PARTS = ("BLOCK_M", "BLOCK_N", "bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2")

Grid3 = tuple[int, int, int]


class Window(NamedTuple):
    """Which tokens a token sees: those within an ellipsoid around it, (dt / frames)^2 + (dy^2 + dx^2) / radius^2 < 1.

    In the token's own frame that is the circle of all tokens at a Euclidean distance below the radius (CLEAR, arXiv 2412.16112).
    """

    radius: int
    frames: int = 1

    @property
    def reach(self) -> Grid3:
        """Say by how many frames, rows and columns the farthest tokens are away."""
        return self.frames - 1, self.radius - 1, self.radius - 1

    @property
    def keys(self) -> int:
        """Count M, the tokens of a block and its surroundings."""
        return math.prod(side + 2 * far for side, far in zip((1, SIDE, SIDE), self.reach, strict=True))

    def sees(self, dt: Tensor, dy: Tensor, dx: Tensor) -> Tensor:
        """Say which offsets are within the window."""
        r, f = self.radius**2, self.frames**2
        return dt**2 * r + (dy**2 + dx**2) * f < r * f

    def rows(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """List the rows in which there is a token that a token sees, (R, 2), as (dt, dy), and to how far left and right of it, (R,)."""
        frames, rows, _ = self.reach
        r, f = self.radius**2, self.frames**2
        found = []
        for dt, dy in itertools.product(range(-frames, frames + 1), range(-rows, rows + 1)):
            if (left := (r * (f - dt**2) - 1) // f - dy**2) >= 0:  # of dx^2 at most
                found.append((dt, dy, math.isqrt(left)))
        table = torch.tensor(found, device=device)
        return table[:, :2], table[:, 2]

    def on(self, grid: Sequence[int]) -> Window:
        """Return the window on a grid: there is one frame if the grid is (h, w)."""
        return self if len(grid) == 3 else self._replace(frames=1)


def block_products(grid: Sequence[int], window: Window) -> tuple[int, int, int]:
    """Count the blocks, and the queries and keys of each that are multiplied, on a grid (h, w) or (t, h, w)."""
    frames, height, width = _in_frames(grid)
    return frames * _ceil(height) * _ceil(width), QUERIES, window.on(grid).keys


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
        mask: by key, boolean or to add to the scores, (B or 1, H or 1, 1, N).

    Returns:
        y, (B, H, N, E), in V's type, and the logarithm of the normaliser, (B, H, N, 1), in float32 or higher, for `merged`. Where a
        query sees no key that counts, y is zero and weighs nothing.
    """
    way = flex_attention_within if _has_flex_kernel(q_BHND, v_BHNE) else attention_in_blocks
    return way(q_BHND, k_BHND, v_BHNE, grid, window, scale, mask)


def attention_in_blocks(
    q_BHND: Tensor, k_BHND: Tensor, v_BHNE: Tensor, grid: Sequence[int], window: Window, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `local_attention` with plain matrix products, those of `block_products`.

    Not compiled, it goes through the blocks in parts of `MOST_SCORES`, each computed again for its gradient.
    """
    window, frames = window.on(grid), _in_frames(grid)
    seen_nM, exists_nM = _around_blocks(frames, window.reach, q_BHND.device)
    own_nS, near_SM = _own(seen_nM, window), _near(window, q_BHND.device)
    bias_BHN1 = key_bias(mask, at_least_float32(q_BHND)).transpose(-1, -2) if mask is not None else None

    def attend(own_nS: Tensor, seen_nM: Tensor, exists_nM: Tensor) -> tuple[Tensor, Tensor]:
        scores_BHnSM = exact_scores(_taken(q_BHND, own_nS), _taken(k_BHND, seen_nM), scale)
        bias = _taken(bias_BHN1, seen_nM).transpose(-1, -2) if bias_BHN1 is not None else scores_BHnSM.new_zeros(())
        counted_BHnSM = torch.where(exists_nM[:, None] & near_SM, bias, float("-inf"))
        return softmax_with_normaliser(scores_BHnSM + counted_BHnSM, _taken(v_BHNE, seen_nM))

    each = q_BHND.shape[0] * q_BHND.shape[1] * QUERIES * window.keys
    y, normaliser = _in_parts(attend, (own_nS, seen_nM, exists_nM), each)
    where_N = _places_in_blocks(frames, q_BHND.device)
    return _from_blocks(y, where_N), _from_blocks(normaliser, where_N)


def _in_parts(
    attend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], blocks: tuple[Tensor, Tensor, Tensor], scores: int
) -> tuple[Tensor, Tensor]:
    """Call a function of blocks (n, ...), each of that many scores, on as many of them at a time as is allowed, and join the results."""
    if torch.compiler.is_compiling() or len(blocks[0]) * scores <= MOST_SCORES:
        return attend(*blocks)
    parts = zip(*(torch.split(x, max(1, MOST_SCORES // scores)) for x in blocks), strict=True)
    y, normaliser = zip(*(checkpoint(attend, *part, use_reentrant=False, preserve_rng_state=False) for part in parts), strict=True)
    return torch.cat(y, 2), torch.cat(normaliser, 2)


def flex_attention_within(
    q_BHND: Tensor, k_BHND: Tensor, v_BHNE: Tensor, grid: Sequence[int], window: Window, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `local_attention` with FlexAttention: a kernel if it is compiled, all pairs of tokens if not."""
    window, frames = window.on(grid), _in_frames(grid)
    own_nS, exists_nS = _around_blocks(frames, (0, 0, 0), q_BHND.device)
    q, k, v = (_taken(x, own_nS).flatten(2, 3) for x in (q_BHND, k_BHND, v_BHNE))
    bias = None if mask is None else _taken(key_bias(mask, torch.float32).transpose(-1, -2), own_nS).flatten(2)
    y, normaliser = _flex(q, k, v, bias, scale, _block_mask(own_nS, exists_nS, frames, window))
    where_N = _places_in_blocks(frames, q.device)
    return y.index_select(2, where_N), normaliser.index_select(2, where_N)


def weight_within(weights_BHN1: Tensor, grid: Sequence[int], window: Window) -> Tensor:
    """Sum up the weights of the tokens that each token sees, (B, H, N, 1).

    In each row of each frame that it sees, these are next to each other: a difference of two sums from the row's start on.
    """
    (frames, height, width), window = _in_frames(grid), window.on(grid)
    sums: Tensor = torch.nn.functional.pad(torch.unflatten(weights_BHN1.squeeze(-1), 2, (frames * height, width)).cumsum(-1), (1, 0))
    t, y, x = (torch.arange(size, device=sums.device) for size in (frames, height, width))
    rows, far = window.rows(sums.device)  # (R, 2) and (R,)
    t, y = t[:, None, None] + rows[:, 0], y[:, None] + rows[:, 1]
    exists_tyR = (t >= 0) & (t < frames) & (y >= 0) & (y < height)
    row_tyR = t.clamp(0, frames - 1) * height + y.clamp(0, height - 1)
    first, last = ((x[:, None] + side).clamp(0, width) for side in (-far, far + 1))
    seen = sums[:, :, row_tyR[:, :, None], last] - sums[:, :, row_tyR[:, :, None], first]
    return torch.where(exists_tyR[:, :, None], seen, 0).sum(-1).flatten(2).unsqueeze(-1)


def attention_to_all(q_BHND: Tensor, k_BHPD: Tensor, v_BHPE: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Compute softmax attention to all keys, with the logarithm of its normaliser as `local_attention` has it."""
    if k_BHPD.shape[2] > 0 and _has_flex_kernel(q_BHND, v_BHPE):
        bias = None if mask is None else key_bias(mask, torch.float32).flatten(2)
        return _flex(q_BHND, k_BHPD, v_BHPE, bias, scale, None)
    return attention_with_normaliser(q_BHND, k_BHPD, v_BHPE, mask, scale)


def merged(y: Tensor, normaliser: Tensor, other: Tensor, its_normaliser: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention to some keys with attention to others, as if it had been to all of them at once.

    Args:
        normaliser, its_normaliser: the logarithms of the normalisers of `y` and of `other`.
    """
    share = torch.sigmoid(its_normaliser - normaliser).expand_as(y)
    joined = torch.lerp(y.to(share.dtype), other.to(share.dtype), share).to(y.dtype)
    return joined, torch.logaddexp(normaliser, its_normaliser)


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


# ------------------------------------------------------------------ FlexAttention


def _has_flex_kernel(q_BHND: Tensor, v_BHNE: Tensor) -> bool:
    compiles = torch.compiler.is_compiling() and not is_exporting()
    heads_fit = min(q_BHND.shape[-1], v_BHNE.shape[-1]) >= _SMALLEST_FLEX_HEAD
    return compiles and q_BHND.device.type == "cuda" and q_BHND.dtype != torch.float64 and heads_fit


def _flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, seen: BlockMask | None) -> tuple[Tensor, Tensor]:
    """Call FlexAttention with what is added to the scores of each key, (B or 1, H or 1, keys)."""
    score = None
    if bias is not None:
        added = _in_memory(bias).expand(q.shape[0], q.shape[1], -1)

        def score(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + added[b, h, j]

    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast, norms leave them in float32; the kernel takes one type, as softmax attention does
    y, beside = flex_attention(q, k, v, score, seen, scale, kernel_options=_flex_options(q.dtype), return_aux=AuxRequest(lse=True))
    assert beside.lse is not None
    return y, beside.lse.clamp(min=NO_WEIGHT).unsqueeze(-1)


def _in_memory(x: Tensor) -> Tensor:
    """Write what the kernel reads to memory: Inductor would compute it inside the kernel, and fails where that depends on open sizes."""
    return x.new_zeros(x.shape).scatter(-1, torch.arange(x.shape[-1], device=x.device).expand_as(x), x)


def _flex_options(dtype: torch.dtype) -> Any:
    """Return what is asked of the kernel: not the one for few queries; and where its tiles would be larger than a block, tiles that fit."""
    options: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True}
    if FLEX_TILES_FIT_BLOCKS:
        return options
    side = QUERIES if dtype != torch.float32 else 16  # of float32, larger ones do not fit the memory of all GPUs
    return options | dict.fromkeys(_FLEX_PARTS, side)


def _block_mask(own_nS: Tensor, exists_nS: Tensor, grid: Grid3, window: Window) -> BlockMask:
    """List which blocks each block's queries see; as seeing is mutual, they are those whose queries see the block's keys."""
    _, height, width = grid
    number, exists = own_nS.flatten(), exists_nS.flatten()
    frame, row, column = _in_memory(torch.stack([number // (height * width), number // width % height, number % width])).unbind()
    exists = _in_memory(exists)

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
