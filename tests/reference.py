"""EDiT and MM-EDiT written from the paper's formulas, in float64 with loops over tokens: independent of the code under test."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import nn

Array = np.ndarray


def weight(layer: nn.Module, name: str = "weight") -> Array:
    return getattr(layer, name).detach().double().numpy()


def linear(layer: nn.Module, x: Array) -> Array:
    return x @ weight(layer).T + weight(layer, "bias")


def project(module: nn.Module, which: int, x: Array) -> Array:
    """The query (0), key (1) or value (2) of tokens (N, C), by a Linear of its own or its third of a fused one."""
    if not hasattr(module, "to_qkv"):
        return linear((module.to_q, module.to_k, module.to_v)[which], x)
    channels = x.shape[1]
    return linear(module.to_qkv, x)[:, which * channels : (which + 1) * channels]


def conv(layer: nn.Module, picture: Array, stride: int, depthwise: bool) -> Array:
    """A 3x3 or 1x1 convolution of (h, w, C), padded to keep centres, one output position at a time."""
    kernel, bias = weight(layer), weight(layer, "bias")
    h, w, _ = picture.shape
    reach = kernel.shape[-1] // 2
    rows, columns = math.ceil(h / stride), math.ceil(w / stride)
    out = np.zeros((rows, columns, kernel.shape[0]))
    for i in range(rows):
        for j in range(columns):
            total = bias.copy()
            for a in range(-reach, reach + 1):
                for b in range(-reach, reach + 1):
                    y, x = i * stride + a, j * stride + b
                    if 0 <= y < h and 0 <= x < w:
                        tap = kernel[:, :, a + reach, b + reach]
                        total += tap[:, 0] * picture[y, x] if depthwise else tap @ picture[y, x]
            out[i, j] = total
    return out


def over_time(layer: nn.Module, frames: Array, mode: str, stride: int) -> Array:
    """A depthwise kernel of three frames, (t, h, w, C), one output frame at a time: around a frame, or up to it."""
    kernel, bias = weight(layer).reshape(-1, 3), weight(layer, "bias")
    offsets = (-1, 0, 1) if mode == "centred" else (-2, -1, 0)
    kept = []
    for own in range(0, len(frames), stride):
        total = np.zeros_like(frames[0]) + bias
        for tap, offset in enumerate(offsets):
            if 0 <= own + offset < len(frames):
                total = total + kernel[:, tap] * frames[own + offset]
        kept.append(total)
    return np.stack(kept)


def as_frames(x: Array, grid: tuple[int, ...]) -> Array:
    """Tokens (N, C) as (t, h, w, C); an image is one frame."""
    return x.reshape(*(1, *grid)[-3:], -1)


def group_norm(layer: nn.Module, frame: Array) -> Array:
    """Of one frame, (h, w, C)."""
    grouped = frame.reshape(-1, layer.num_groups, frame.shape[-1] // layer.num_groups)
    mean, variance = grouped.mean((0, 2), keepdims=True), grouped.var((0, 2), keepdims=True)
    return ((grouped - mean) / np.sqrt(variance + layer.eps)).reshape(frame.shape) * weight(layer) + weight(layer, "bias")


def conv_fusion(module: nn.Module, x: Array, grid: tuple[int, ...], temporal: str) -> Array:
    """X + Conv1x1(LeakyReLU(GroupNorm(Conv3x3(X)))) for tokens (N, C), each frame by itself but for the temporal kernel."""
    frames = as_frames(x, grid)
    if module.depthwise is not None:  # the 3x3 in two
        frames = np.stack([conv(module.depthwise, frame, 1, True) for frame in frames])
    hidden = np.stack([conv(module.reduce, frame, 1, False) for frame in frames])
    if temporal != "none":
        hidden = over_time(module.temporal, hidden, temporal, 1)
    hidden = np.stack([group_norm(module.norm, frame) for frame in hidden])
    hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
    return x + np.stack([conv(module.restore, frame, 1, False) for frame in hidden]).reshape(x.shape)


def compressor(module: nn.Module, x: Array, grid: tuple[int, ...], temporal: str, stride: int) -> Array:
    """A 3x3 depthwise convolution of stride 2 for tokens (N, C), frame by frame, then the temporal kernel."""
    frames = np.stack([conv(module.conv, frame, 2, True) for frame in as_frames(x, grid)])
    if temporal != "none":
        frames = over_time(module.temporal, frames, temporal, stride)
    return frames.reshape(-1, x.shape[1])


def softmax_row(q: Array, keys: Array, values: Array) -> tuple[Array, float]:
    logits = [float(q @ k) / math.sqrt(len(q)) for k in keys]
    weights = [math.exp(logit) for logit in logits]
    return weighted(weights, values), sum(weights)


def linear_row(q: Array, keys: Array, values: Array) -> tuple[Array, float]:
    """Of features of the query and of the keys."""
    weights = [float(q @ k) for k in keys]
    return weighted(weights, values), sum(weights)


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def features(module: nn.Module, kind: str, which: str, head: int, x: Array) -> Array:
    """Of queries or keys (N, D) of a head: max(x, 0), ELU(x) + 1, or max(x W + b, 0)."""
    if kind == "relu":
        return relu(x)
    if kind == "elu":
        return np.where(x > 0, x, np.expm1(np.minimum(x, 0))) + 1
    learned = getattr(module.edit, f"{which}_features")
    return relu(x @ weight(learned)[head] + weight(learned, "bias")[head])


def weighted(weights: list[float], values: Array) -> Array:
    """The weighted mean; zero where nothing has weight, as with a query orthogonal to every key or without any key."""
    total = sum(weights)
    mean = np.zeros(values.shape[1])
    for a, v in zip(weights, values, strict=True):
        mean += a / total * v if total else 0
    return mean


def rms(x: Array, layer: nn.Module) -> Array:
    if not hasattr(layer, "weight"):
        return x
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + layer.eps) * weight(layer)


def rope(x: Array, positions: Array) -> Array:
    """(N, D): the toy's rotary embedding at these positions."""
    angles = positions[:, None] * np.linspace(1, 0.1, x.shape[1], dtype=np.float32).astype(np.float64)
    half = x.shape[1] // 2
    rotated = np.concatenate([-x[:, half:], x[:, :half]], 1)
    return x * np.cos(angles) + rotated * np.sin(angles)


def image_projection(module: nn.Module, config: Any, which: int, image: Array, grid: tuple[int, ...]) -> Array:
    """Query, key or value of the image tokens under the configured row of the paper's ablation."""
    name = ("query", "key", "value")[which]
    kind, added = getattr(config, name), getattr(module.edit, name)
    temporal = config.temporal if len(grid) == 3 else "none"
    if kind == "conv-fusion":
        return project(module, which, conv_fusion(added, image, grid, temporal))
    projected = project(module, which, image)
    return compressor(added, projected, grid, temporal, config.temporal_stride) if kind == "compressor" else projected


def share_of_linear(module: nn.Module, config: Any, head: int, image: int, others: int, z_linear: float, z_text: float) -> float:
    """Eta, from the numbers of tokens or from the normalisers."""
    if config.eta == "exact":
        return z_linear / (z_linear + z_text)
    a = math.exp(float(weight(module.edit, "log_weight")[head, 0, 0])) if config.eta == "calibrated" else 1
    return image * a / (image * a + others)


def site(
    module: nn.Module,
    config: Any,
    image: Array,
    text: Array | None,
    grid: tuple[int, ...],
    *,
    rotary: bool = False,
    counts: Array | None = None,
) -> Array:
    """A converted ToyAttention on one sample.

    Args:
        image: (R + N, C), registers before the image tokens.
        text: (T, C).
        grid: (h, w) or (t, h, w) of the image tokens.
        counts: (T,), false for padding.

    Returns:
        All rows, (R + N + T, C), in the module's order.
    """
    n, channels = math.prod(grid), image.shape[1]
    registers, image = np.split(image, [len(image) - n])
    text = np.zeros((0, channels)) if text is None else text
    r, t = len(registers), len(text)
    start = (t if module.text_first else 0) + r
    image_positions = start + np.arange(n)
    text_positions = (0 if module.text_first else r + n) + np.arange(t)
    other_positions = np.concatenate([start - r + np.arange(r), text_positions])
    others = np.concatenate([registers, text])
    counted = np.ones(r + t, dtype=bool)
    if counts is not None:
        counted[r:] = counts

    compressed = config.key == "compressor"
    every = config.temporal_stride if len(grid) == 3 else 1
    centres = as_frames(image_positions, grid)[::every, ::2, ::2].flatten() if compressed else image_positions
    q_image, k_image, v_image = (image_projection(module, config, which, image, grid) for which in range(3))
    q_other, k_other, v_other = (project(module, which, others) for which in range(3))
    full_text_keys = compressed and config.text_keys == "full"
    seen_positions = image_positions if full_text_keys else centres
    k_seen, v_seen = (project(module, 1, image), project(module, 2, image)) if full_text_keys else (k_image, v_image)

    size = channels // module.heads
    group_size = module.heads // module.key_heads
    rows = np.zeros((n + r + t, channels))
    for head in range(module.heads):
        group = head // group_size
        cut, key_cut = slice(head * size, (head + 1) * size), slice(group * size, (group + 1) * size)

        def turned(x: Array, positions: Array, norm: nn.Module) -> Array:
            return rope(rms(x, norm), positions) if rotary else rms(x, norm)

        qi, qo = turned(q_image[:, cut], image_positions, module.norm_q), turned(q_other[:, cut], other_positions, module.norm_q)
        ki, vi = turned(k_image[:, key_cut], centres, module.norm_k), v_image[:, key_cut]
        ks, vs = turned(k_seen[:, key_cut], seen_positions, module.norm_k), v_seen[:, key_cut]
        ko, vo = turned(k_other[:, key_cut], other_positions, module.norm_k)[counted], v_other[counted][:, key_cut]
        q_features = features(module, config.features, "query", head, qi)
        k_features = features(module, config.features, "key", group, ki)
        for i in range(n):
            y, z_linear = linear_row(q_features[i], k_features, vi)
            if r + t:
                y_other, z_other = softmax_row(qi[i], ko, vo)
                eta = share_of_linear(module, config, head, n, counted.sum(), z_linear, z_other)
                y = eta * y + (1 - eta) * y_other
            rows[image_positions[i], cut] = y
        for i in range(r + t):
            rows[other_positions[i], cut] = softmax_row(qo[i], np.concatenate([ks, ko]), np.concatenate([vs, vo]))[0]
    return linear(module.to_out, rows)
