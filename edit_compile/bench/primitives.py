"""The parts of designs as calls that can be timed: at the rates that this machine's own kernels reach."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from edit_compile.designs.ops.parts import Part, Product, Softmax

_MOST_NUMBERS = 2**27  # in one operand: of larger ones a share is timed
_MOST_ROWS = 2**14
_MOST_QUERIES = 2**12
_MOST_HEADS = 2**9


def as_call(part: Part, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Any], float]:
    """Make a call that does a part, or a share of it that is large enough to reach the same rate.

    Returns:
        The call, and how many of them the part is.
    """
    return _product(part, device, dtype) if isinstance(part, Product) else _softmax(part, device, dtype)


def _product(part: Product, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Any], float]:
    count, inner = min(part.count, _MOST_HEADS), part.inner
    if part.rows * part.columns < inner:  # a sum over many tokens
        inner = min(inner, _MOST_ROWS)
    rows = max(1, min(part.rows, _MOST_ROWS, _MOST_NUMBERS // (max(inner, part.columns) * count)))
    a = torch.randn(count, rows, inner, device=device, dtype=dtype)
    b = torch.randn(count, inner, part.columns, device=device, dtype=dtype)
    call = partial(torch.mm, a[0], b[0]) if count == 1 else partial(torch.bmm, a, b)
    return call, part.flops / Product(rows, part.columns, inner, count).flops


def _softmax(part: Softmax, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Any], float]:
    count, queries = min(part.count, _MOST_HEADS), min(part.queries, _MOST_QUERIES)
    query = torch.randn(1, count, queries, part.head_dim, device=device, dtype=dtype)
    key = torch.randn(1, count, part.keys, part.head_dim, device=device, dtype=dtype)
    value = torch.randn(1, count, part.keys, part.value_dim, device=device, dtype=dtype)
    share = Softmax(queries, part.keys, part.head_dim, part.value_dim, count)
    return partial(F.scaled_dot_product_attention, query, key, value), part.flops / share.flops
