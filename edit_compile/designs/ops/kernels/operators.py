"""The operators `edit_compile::linear_attention` and `edit_compile::depthwise`, as torch.compile and torch.export see them.

On CUDA they are Triton kernels, which Inductor and AOTInductor compile with the rest; elsewhere torch computes the same formulas.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import triton_op, wrap_triton

from edit_compile.designs.ops.feature_maps import elu_plus_one
from edit_compile.designs.ops.key_masks import NO_WEIGHT, at_least_float32, key_weights
from edit_compile.designs.ops.linear_attention import linear_attention as by_formula
from edit_compile.designs.ops.linear_attention import or_one
from edit_compile.torch_internals import is_exported, needs_gradients

Features = Literal["none", "relu", "elu"]
HAS_TRITON = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_WIDEST = 128  # channels of a head
_MAPS: dict[str, Any] = {"none": lambda x: x, "relu": torch.relu, "elu": elu_plus_one}
_TINY = torch.finfo(torch.float32).tiny

if HAS_TRITON:
    from edit_compile.designs.ops.kernels import triton_code as code
    from edit_compile.designs.ops.kernels.triton_code import attend, sum_keys, thin_both  # caches of torch look for their names


def takes(*tensors: Tensor) -> bool:
    """Say whether the kernels run on these tensors here: of one type, on CUDA with Triton, or in its interpreter."""
    first, *others = tensors
    here = HAS_TRITON and (first.is_cuda or (_INTERPRETED and first.device.type == "cpu"))
    return here and first.dtype in (torch.float32, torch.float16, torch.bfloat16) and all(x.dtype == first.dtype for x in others)


# ------------------------------------------------------------------ linear attention


def linear_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, features: Features) -> tuple[Tensor, Tensor] | None:
    """Compute what `linear_attention` does of features of Q and K, by the operator.

    Returns:
        None where something is trained, or where a graph is made for programs that have no such operator.
    """
    if needs_gradients(q, k, v) or is_exported() or not q.numel() or not k.numel():
        return None
    if mask is None:
        y, log_normaliser = torch.ops.edit_compile.linear_attention(q, k, v, features, None)
        return y, log_normaliser
    weights, log_scale = key_weights(mask, at_least_float32(k))
    y, log_normaliser = torch.ops.edit_compile.linear_attention(q, k, v, features, weights)
    return y, torch.where(log_normaliser > NO_WEIGHT, log_normaliser + log_scale, NO_WEIGHT)


def _formula(q: Tensor, k: Tensor, v: Tensor, features: str, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    to_features = _MAPS[features]
    keys = to_features(k)
    return by_formula(to_features(q), keys if weights is None else keys * weights.to(keys.dtype), v)


@triton_op(
    "edit_compile::linear_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, str features, Tensor? weights) -> (Tensor, Tensor)",
)
def _linear_attention(q: Tensor, k: Tensor, v: Tensor, features: str, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """q (B, H, N, D), k (B, H, M, D), v (B, H, M, E), weights of keys (B or 1, H or 1, M, 1) to (B, H, N, E) and (B, H, N, 1)."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    d, e = int(q.shape[3]), int(v.shape[3])  # constants of the code
    if not takes(q, k, v) or max(d, e) > _WIDEST:
        return _formula(q, k, v, features, weights)
    kind = {"none": code.NO_FEATURES, "relu": code.RELU, "elu": code.ELU}[features]
    sizes = {"D": d, "E": e, "BLOCK_D": _block(d), "BLOCK_E": _block(e), "FEATURES": kind, "num_warps": 8 if max(d, e) > 64 else 4}
    rows = 32 if q.dtype == torch.float32 else 64  # at a time, as shared memory has room for
    parts = -(-keys // code.KEYS_OF_A_PART)
    state, total = (q.new_empty((batch * heads, parts, *size), dtype=torch.float32) for size in ((d, e), (d,)))
    by_head = k if weights is None else weights.expand(batch, heads, keys, 1)
    wrap_triton(sum_keys)[(parts, batch * heads)](
        k, v, by_head, state, total, *k.stride(), *v.stride(), *by_head.stride()[:3], heads, keys, parts,
        BLOCK_M=rows, BLOCKS=code.KEYS_OF_A_PART // rows, WEIGHTED=weights is not None, **sizes,
    )  # fmt: skip
    mean = total.sum(1) / keys
    top = mean.amax(-1, keepdim=True).clamp(min=_TINY)
    means = (state.sum(1) / (or_one(mean) * keys).unsqueeze(-1)).to(v.dtype)
    y = q.new_empty((batch, queries, heads, e))  # as the projection behind it reads it
    log_normaliser = q.new_empty((batch, heads, queries, 1), dtype=torch.float32)
    block = 64 if q.dtype != torch.float32 else 32 if max(d, e) > 64 else 16  # as registers have room for
    wrap_triton(attend)[(-(-queries // block), batch * heads)](
        q, mean / top, means, (top * keys).log(), y, log_normaliser, *q.stride(), y.stride(0), y.stride(2), y.stride(1), heads, queries,
        BLOCK_N=block, TINY=_TINY, NO_WEIGHT=NO_WEIGHT, **sizes,
    )  # fmt: skip
    return y.transpose(1, 2), log_normaliser


def _block(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, ctx.features, weights = inputs
    ctx.save_for_backward(q, k, v, weights)


def _gradients(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    """Differentiate the formula, computed again."""
    q, k, v, *weights = (x.detach().requires_grad_() for x in ctx.saved_tensors if x is not None)
    with torch.enable_grad():
        outputs = _formula(q, k, v, ctx.features, weights[0] if weights else None)
    found = torch.autograd.grad(outputs, [q, k, v, *weights], gradients)
    return *found[:3], None, found[3] if weights else None


_linear_attention.register_autograd(_gradients, setup_context=_save)

# ------------------------------------------------------------------ the compressor


def depthwise(conv: nn.Conv2d, image: Tensor) -> Tensor | None:
    """Compute a depthwise 3x3 convolution of an image (B, C, h, w), by the operator.

    Returns:
        None where something is trained, where a graph is made for programs that have no such operator, or if the module is more than a
        plain convolution.
    """
    if type(conv) is not nn.Conv2d or conv.bias is None or conv._forward_hooks or conv._forward_pre_hooks:
        return None
    if needs_gradients(image, conv.weight) or is_exported() or not image.numel():
        return None
    (found,) = torch.ops.edit_compile.depthwise([image], [conv.weight], [conv.bias], conv.stride[0])
    return found  # type: ignore[no-any-return]


def _convolved(image: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    return F.conv2d(image, weight, bias, stride, weight.shape[-1] // 2, groups=weight.shape[0])


@triton_op(
    "edit_compile::depthwise", mutates_args=(), schema="(Tensor[] images, Tensor[] weights, Tensor[] biases, int stride) -> Tensor[]"
)
def _depthwise(images: list[Tensor], weights: list[Tensor], biases: list[Tensor], stride: int) -> list[Tensor]:
    """Images (B, C, h, w), one or two of a shape, such as keys and values; 3x3 kernels; to (B, C, ceil(h / stride), ceil(w / stride))."""
    if not takes(*images, *weights, *biases) or len(images) > 2 or images[0].shape != images[-1].shape:
        return [_convolved(*each, stride) for each in zip(images, weights, biases, strict=True)]
    batch, channels, rows, columns = images[0].shape
    size = (-(-rows // stride), -(-columns // stride))
    tokens = size[0] * size[1]
    made = [image.new_empty((batch, *size, channels)) for image in images]
    pairs = [(image, weight.contiguous(), bias, y) for image, weight, bias, y in zip(images, weights, biases, made, strict=True)]
    both = len(images) == 2
    last = pairs[1] if both else (*pairs[0][:3], images[0])  # nothing is written to it
    grid = (-(-tokens // code.TOKENS_OF_A_PROGRAM), -(-channels // code.CHANNELS_OF_A_PROGRAM), batch)
    wrap_triton(thin_both)[grid](
        *pairs[0], *last, *images[0].stride(), *images[-1].stride(), channels, rows, columns, size[1], tokens,
        STRIDE=stride, TAPS=int(weights[0].shape[-1]), BOTH=both, BLOCK_N=code.TOKENS_OF_A_PROGRAM, BLOCK_C=code.CHANNELS_OF_A_PROGRAM,
    )  # fmt: skip
    return [y.movedim(-1, 1) for y in made]


def _save_images(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    images, weights, _, ctx.stride = inputs
    ctx.save_for_backward(*images, *weights)


def _gradients_of_images(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    half = len(ctx.saved_tensors) // 2
    found: list[tuple[Tensor, ...]] = []
    for gradient, image, weight in zip(gradients, ctx.saved_tensors[:half], ctx.saved_tensors[half:], strict=True):
        channels, edge, stride = weight.shape[0], [weight.shape[-1] // 2] * 2, [ctx.stride] * 2
        convolution = (stride, edge, [1, 1], False, [0, 0], channels, [True] * 3)
        found.append(torch.ops.aten.convolution_backward(gradient, image, weight, [channels], *convolution))
    return *(list(each) for each in zip(*found, strict=True)), None


_depthwise.register_autograd(_gradients_of_images, setup_context=_save_images)
