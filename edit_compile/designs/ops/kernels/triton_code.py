"""The kernels. They take tensors by strides, whatever their layout, read each number once, and sum in float32.

Triton's own interpreter runs them without a GPU if TRITON_INTERPRET=1 is set before this module is imported.
"""
# No future annotations: Triton's compiler reads them.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

KEYS_OF_A_PART = 512  # that one program sums up
TOKENS_OF_A_PROGRAM, CHANNELS_OF_A_PROGRAM = 16, 64  # that the depthwise convolution makes
NO_FEATURES, RELU, ELU = 0, 1, 2  # ELU is ELU + 1


@triton.jit
def _mapped(x, FEATURES: tl.constexpr):
    if FEATURES == 1:
        x = tl.where(x < 0, 0.0, x)  # not a maximum, which would hide NaN
    if FEATURES == 2:
        x = tl.where(x >= 0, x + 1, tl.exp(tl.where(x >= 0, 0.0, x)))
    return x


@triton.jit
def sum_keys(
    k, v, weights, state, total,
    k_batch, k_head, k_token, k_channel, v_batch, v_head, v_token, v_channel, w_batch, w_head, w_token,
    heads, keys, parts,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr,
    FEATURES: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Sum up features of a part of a head's keys, alone into total (B H, parts, D), times values into state (B H, parts, D, E)."""
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    k += head // heads * k_batch + head % heads * k_head
    v += head // heads * v_batch + head % heads * v_head
    weights += head // heads * w_batch + head % heads * w_head
    products = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    sums = tl.zeros([BLOCK_D], tl.float32)
    for block in range(BLOCKS):
        m = ((part * BLOCKS + block) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = (m[:, None] < keys) & (d[None, :] < D)
        value = tl.load(v + m[:, None] * v_token + e[None, :] * v_channel, mask=(m[:, None] < keys) & (e[None, :] < E), other=0.0)
        key = tl.load(k + m[:, None] * k_token + d[None, :] * k_channel, mask=inside, other=0.0).to(tl.float32)
        key = tl.where(inside, _mapped(key, FEATURES), 0.0)
        if WEIGHTED:
            key *= tl.load(weights + m * w_token, mask=m < keys, other=0.0)[:, None]
        sums += tl.sum(key, 0)
        products += tl.dot(tl.trans(key.to(value.dtype)), value, input_precision="ieee")
    at = (head * parts + part) * D + d
    tl.store(total + at, sums, mask=d < D)
    tl.store(state + at[:, None] * E + e[None, :], products, mask=(d[:, None] < D) & (e[None, :] < E))


@triton.jit
def attend(
    q, shares, means, log_scale, y, log_normaliser,
    q_batch, q_head, q_token, q_channel, y_batch, y_head, y_token,
    heads, queries,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    FEATURES: tl.constexpr, TINY: tl.constexpr, NO_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Mix the means of values (B H, D, E) for a block of a head's queries, by their features times shares (B H, D)."""
    head = tl.program_id(1).to(tl.int64)
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    inside = (n[:, None] < queries) & (d[None, :] < D)
    q += head // heads * q_batch + head % heads * q_head
    query = tl.load(q + n[:, None] * q_token + d[None, :] * q_channel, mask=inside, other=0.0).to(tl.float32)
    share = tl.load(shares + head * D + d, mask=d < D, other=0.0)
    mixed = _mapped(query, FEATURES) * share[None, :]
    total = tl.sum(mixed, 1)
    divisor = tl.where(total >= TINY, total, 1.0)
    mean = tl.load(means + (head * D + d[:, None]) * E + e[None, :], mask=(d[:, None] < D) & (e[None, :] < E), other=0.0)
    found = tl.dot((mixed / divisor[:, None]).to(mean.dtype), mean, input_precision="ieee")
    y += head // heads * y_batch + head % heads * y_head
    tl.store(y + n[:, None] * y_token + e[None, :], found.to(y.dtype.element_ty), mask=(n[:, None] < queries) & (e[None, :] < E))
    logarithm = tl.where(total >= TINY, tl.log(divisor) + tl.load(log_scale + head), NO_WEIGHT)
    tl.store(log_normaliser + head * queries + n, logarithm, mask=n < queries)


@triton.jit
def _thinned(
    x, weight, bias, y, x_batch, x_channel, x_row, x_column, channels, rows, columns, y_columns, tokens,
    STRIDE: tl.constexpr, TAPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    n, c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    made = (n[:, None] < tokens) & (c[None, :] < channels)
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32) + tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(TAPS * TAPS):
        row, column = n // y_columns * STRIDE + tap // TAPS - TAPS // 2, n % y_columns * STRIDE + tap % TAPS - TAPS // 2
        seen = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        at = batch * x_batch + row.to(tl.int64) * x_row + column.to(tl.int64) * x_column
        value = tl.load(x + at[:, None] + c[None, :] * x_channel, mask=made & seen[:, None], other=0.0).to(tl.float32)
        total += value * tl.load(weight + c * TAPS * TAPS + tap, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    at = (batch * tokens + n)[:, None] * channels + c[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=made)


@triton.jit
def thin_both(
    k, k_weight, k_bias, k_out, v, v_weight, v_bias, v_out,
    k_batch, k_channel, k_row, k_column, v_batch, v_channel, v_row, v_column,
    channels, rows, columns, y_columns, tokens,
    STRIDE: tl.constexpr, TAPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """Compute a depthwise convolution of an image, or one each of two, channels last in memory: (B, channels, rows, columns) to
    (B, tokens, channels). The taps beyond an edge see zeros."""
    _thinned(
        k, k_weight, k_bias, k_out, k_batch, k_channel, k_row, k_column, channels, rows, columns, y_columns, tokens,
        STRIDE, TAPS, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    if BOTH:
        _thinned(
            v, v_weight, v_bias, v_out, v_batch, v_channel, v_row, v_column, channels, rows, columns, y_columns, tokens,
            STRIDE, TAPS, BLOCK_N, BLOCK_C,
        )  # fmt: skip
