"""EDiT and MM-EDiT written from the paper's formulas, in float64 with loops over tokens: independent of the code under test."""

from __future__ import annotations

import math

import numpy as np
from torch import nn

Array = np.ndarray


def weight(layer: nn.Module, name: str = "weight") -> Array:
    return getattr(layer, name).detach().double().numpy()


def linear(layer: nn.Module, x: Array) -> Array:
    return x @ weight(layer).T + weight(layer, "bias")


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


def conv_fusion(module: nn.Module, x: Array, h: int, w: int) -> Array:
    """X + Conv1x1(LeakyReLU(GroupNorm(Conv3x3(X)))) for tokens (N, C)."""
    hidden = conv(module.reduce, x.reshape(h, w, -1), 1, False)
    groups = module.norm.num_groups
    grouped = hidden.reshape(h * w, groups, -1)
    mean, variance = grouped.mean((0, 2), keepdims=True), grouped.var((0, 2), keepdims=True)
    hidden = ((grouped - mean) / np.sqrt(variance + module.norm.eps)).reshape(h, w, -1)
    hidden = hidden * weight(module.norm) + weight(module.norm, "bias")
    hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
    return x + conv(module.restore, hidden, 1, False).reshape(h * w, -1)


def softmax_row(q: Array, keys: Array, values: Array) -> tuple[Array, float]:
    logits = [float(q @ k) / math.sqrt(len(q)) for k in keys]
    weights = [math.exp(logit) for logit in logits]
    total = sum(weights)
    return sum(a * v for a, v in zip(weights, values, strict=True)) / total, total


def linear_row(q: Array, keys: Array, values: Array) -> tuple[Array, float]:
    weights = [float(np.maximum(q, 0) @ np.maximum(k, 0)) for k in keys]
    total = sum(weights)
    if total == 0:  # a query orthogonal to every key: the denominator is bounded below, so the answer is zero
        return np.zeros(values.shape[1]), 0.0
    return sum(a * v for a, v in zip(weights, values, strict=True)) / total, total


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


def site(module: nn.Module, image: Array, text: Array | None, h: int, w: int, *, rotary: bool, eta: str, full_text_keys: bool) -> Array:
    """A converted ToyAttention on one sample: image (N, C) and text (T, C) to all rows in the module's order."""
    n, t = h * w, 0 if text is None else len(text)
    offset = t if module.text_first else 0
    image_positions = offset + np.arange(n)
    text_positions = (0 if module.text_first else n) + np.arange(t)
    centres = np.array([i * w + j for i in range(0, h, 2) for j in range(0, w, 2)])
    heads, channels = module.heads, image.shape[1]
    size = channels // heads

    q_image = linear(module.to_q, conv_fusion(module.edit.query, image, h, w))
    k_full, v_full = linear(module.to_k, image), linear(module.to_v, image)
    k_small, v_small = (
        conv(part.conv, x.reshape(h, w, -1), 2, True).reshape(-1, channels)
        for part, x in ((module.edit.key, k_full), (module.edit.value, v_full))
    )
    empty = np.zeros((0, channels))
    q_text, k_text, v_text = (linear(layer, text) if text is not None else empty for layer in (module.to_q, module.to_k, module.to_v))

    rows = np.zeros((n + t, channels))
    for head in range(heads):
        cut = slice(head * size, (head + 1) * size)

        def key(x: Array, positions: Array, norm: nn.Module, cut: slice = cut) -> Array:
            normed = rms(x[:, cut], norm)
            return rope(normed, positions) if rotary else normed

        qi, qt = key(q_image, image_positions, module.norm_q), key(q_text, text_positions, module.norm_q)
        ki, kf = key(k_small, image_positions[centres], module.norm_k), key(k_full, image_positions, module.norm_k)
        kt, vi, vf, vt = key(k_text, text_positions, module.norm_k), v_small[:, cut], v_full[:, cut], v_text[:, cut]
        seen_k, seen_v = (kf, vf) if full_text_keys else (ki, vi)
        for i in range(n):
            y, z_linear = linear_row(qi[i], ki, vi)
            if t:
                y_text, z_text = softmax_row(qi[i], kt, vt)
                share = z_linear / (z_linear + z_text) if eta == "exact" else n / (n + t)
                if eta == "calibrated":
                    a = math.exp(float(weight(module.edit, "log_weight")[head, 0, 0]))
                    share = n * a / (n * a + t)
                y = share * y + (1 - share) * y_text
            rows[image_positions[i], cut] = y
        for i in range(t):
            rows[text_positions[i], cut] = softmax_row(qt[i], np.concatenate([seen_k, kt]), np.concatenate([seen_v, vt]))[0]
    return linear(module.to_out, rows)
