"""Runs the Triton kernels in Triton's interpreter, which needs no GPU, and prints their relative errors against float64 by case, as JSON.

Run it with TRITON_INTERPRET=1, which has to be set before Triton is imported.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from edit_compile.designs.ops.kernels import operators

NAN, GUARD = float("nan"), 3  # beside what a kernel may read are numbers that show up in its result
CASES = {  # queries, keys, channels of queries and keys, of values, dtype, features, mask; the interpreter has no products in bfloat16
    "one of everything": (1, 1, 16, 16, "float32", "relu", None),
    "blocks that are not full": (40, 65, 24, 40, "float32", "none", None),
    "several parts": (20, 1050, 16, 16, "float32", "relu", None),
    "72 channels": (40, 33, 72, 72, "float32", "relu", None),
    "128 channels": (17, 70, 128, 128, "float32", "elu", None),
    "40 channels, elu": (33, 90, 40, 24, "float32", "elu", None),
    "float16": (70, 530, 64, 64, "float16", "relu", None),
    "a mask": (33, 90, 24, 16, "float32", "relu", "boolean"),
    "an additive mask by head": (33, 90, 24, 16, "float32", "elu", "additive"),
}
IMAGES = {  # channels, rows, columns, stride, dtype, how many images
    "an odd image": (70, 7, 5, 2, "float32", 1),
    "a row": (16, 1, 9, 2, "float32", 1),
    "two images": (40, 6, 8, 2, "float32", 2),
    "stride 1": (16, 5, 6, 1, "float32", 2),
    "in float16": (64, 8, 8, 2, "float16", 2),
    "in bfloat16": (64, 8, 8, 2, "bfloat16", 1),
}


def guarded(x: Tensor) -> Tensor:
    """The same numbers, as part of a larger tensor of NaN."""
    around = x.new_full([size + GUARD for size in x.shape], NAN)
    inside = around[tuple(slice(1, 1 + size) for size in x.shape)]
    return inside.copy_(x)


def heads_in_tokens(generator: torch.Generator, tokens: int, channels: int, dtype: torch.dtype) -> Tensor:
    """(2, 3, tokens, channels), the heads of a token next to each other in memory, as a projection gives them."""
    x = torch.randn(2, tokens, 3 * channels, generator=generator, dtype=torch.float64).to(dtype)
    return guarded(x).unflatten(2, (3, channels)).transpose(1, 2)


def expected_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, features: str) -> tuple[Tensor, Tensor]:
    q, k, v = q.double(), k.double(), v.double()
    if features != "none":
        q, k = (x.clamp(min=0) if features == "relu" else torch.nn.functional.elu(x) + 1 for x in (q, k))
    scores = q @ k.mT
    if mask is not None:
        scores = scores * (mask.double() if mask.dtype == torch.bool else mask.double().exp())
    total = scores.sum(-1, keepdim=True)
    return scores / total.where(total > 0, 1) @ v, total.log().clamp(min=torch.finfo(torch.float32).min)


def attention_errors(name: str) -> Iterator[float]:
    queries, keys, d, e, dtype, features, mask_kind = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    sizes = ((queries, d), (keys, d), (keys, e))
    q, k, v = (heads_in_tokens(generator, *size, getattr(torch, dtype)) for size in sizes)
    if features == "none":
        q, k = q.abs(), k.abs()
    if mask_kind == "boolean":
        mask = torch.rand(2, 1, 1, keys, generator=generator) > 0.4
    else:
        mask = torch.randn(1, 3, 1, keys, generator=generator) * 5 if mask_kind else None
    found = operators.linear_attention(q, k, v, mask, features)
    assert found is not None
    y, log_normaliser = found
    expected, log_expected = expected_attention(q, k, v, mask, features)
    assert y.dtype == v.dtype
    assert y.shape == expected.shape
    assert y.transpose(1, 2).is_contiguous()
    yield ((y.double() - expected).norm() / expected.norm()).item()
    yield ((log_normaliser.double() - log_expected).abs().max() / 10).item()


def image_errors(name: str) -> Iterator[float]:
    channels, rows, columns, stride, dtype, count = IMAGES[name]
    generator = torch.Generator().manual_seed(len(name))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(getattr(torch, dtype))

    images = [guarded(random(2, rows * columns, channels)).unflatten(1, (rows, columns)).movedim(-1, 1) for _ in range(count)]
    weights, biases = [random(channels, 1, 3, 3) for _ in images], [random(channels) for _ in images]
    found = torch.ops.edit_compile.depthwise(images, weights, biases, stride)
    assert len(found) == count
    for y, image, weight, bias in zip(found, images, weights, biases, strict=True):
        expected = torch.nn.functional.conv2d(image.double(), weight.double(), bias.double(), stride, 1, groups=channels)
        assert y.dtype == image.dtype
        assert y.shape == expected.shape
        assert y.flatten(2).transpose(1, 2).is_contiguous()
        yield ((y.double() - expected).norm() / expected.norm()).item()


def nothing_to_divide_by() -> Iterator[float]:
    """A query that no key has anything in common with gives zero, and no weight; NaN stays NaN."""
    q, k, v = torch.zeros(1, 1, 4, 16), torch.rand(1, 1, 5, 16), torch.ones(1, 1, 5, 16)
    q[0, 0, 2] = NAN
    y, log_normaliser = operators.linear_attention(q, k, v, None, "relu") or (q, q)
    yield y[0, 0, :2].abs().max().item()
    yield float(not (log_normaliser[0, 0, 0] < -1e38 and y[0, 0, 2].isnan().all()))


def main() -> None:
    operators.wrap_triton = lambda kernel: kernel  # that of torch 2.11 takes no interpreted ones
    found: dict[str, list[float]] = {name: list(attention_errors(name)) for name in CASES}
    found |= {name: list(image_errors(name)) for name in IMAGES}
    found["nothing to divide by"] = list(nothing_to_divide_by())
    json.dump({name: max(errors) if not any(map(math.isnan, errors)) else 1.0 for name, errors in found.items()}, sys.stdout)


if __name__ == "__main__":
    main()
