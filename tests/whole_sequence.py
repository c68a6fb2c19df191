"""Toys converted to designs in which all queries attend to the same keys, against loops in float64, and through the public face."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import edit_compile as ec
import reference
import toy
from reference import Array
from toy_clip import Clip, clip

CHANNELS = 24
Grid = tuple[int, ...]
CASES: dict[str, dict[str, Any]] = {
    "image": {"fused": True, "qk_norm": True, "rope": True},
    "text": {"joint": True, "text_first": True, "padded": True, "additive": True, "registers": 3, "heads": 4, "key_heads": 2},
    "video and text": {"video": True, "joint": True},
}


class Maps(NamedTuple):
    """What a design makes of the image tokens (N, C) of a site's module: its queries, and its keys and values, which may be fewer."""

    query: Callable[[nn.Module, Array, Grid], Array]
    key: Callable[[nn.Module, Array, Grid], Array]
    value: Callable[[nn.Module, Array, Grid], Array]


def plain(which: int) -> Callable[[nn.Module, Array, Grid], Array]:
    """The model's own query (0), key (1) or value (2)."""
    return lambda module, image, grid: reference.project(module, which, image)


def relu_weight(q: Array, k: Array) -> float:
    return sum(max(float(a), 0.0) * max(float(b), 0.0) for a, b in zip(q, k, strict=True))


def site(
    module: nn.Module,
    image: Array,
    text: Array | None,
    grid: Grid,
    maps: Maps,
    weigh: Callable[[Array, Array], float],
    *,
    stride: int = 1,
    rotary: bool = False,
    counts: Array | None = None,
    balanced: bool = False,
) -> Array:
    """A converted ToyAttention on one sample: every query's mean of the values of the keys that count, by positive weights.

    Args:
        image: (R + N, C), registers before the image tokens.
        text: (T, C), of which those with `counts` (T,) are keys.
        weigh: the weight of a key (D,) for a query (D,).
        stride: of the rows and columns whose positions the keys of the image have.
        balanced: a key of the image has the weight of as many as it stands for, if there are other keys.
    """
    n, channels = math.prod(grid), image.shape[1]
    registers, image = image[: len(image) - n], image[len(image) - n :]
    text = np.zeros((0, channels)) if text is None else text
    first, second = (text, registers) if module.text_first else (registers, text[:0])
    before = np.concatenate([first, second])
    after = text[:0] if module.text_first else text
    start = len(before)
    others = np.concatenate([before, after])
    other_positions = [*range(start), *range(start + n, start + n + len(after))]
    is_text = [*([True] * len(first) + [False] * len(second) if module.text_first else [False] * start), *[True] * len(after)]
    counted = list(range(len(others)))
    if counts is not None:
        texts = [i for i, each in enumerate(is_text) if each]
        counted = [i for i in counted if not is_text[i] or counts[texts.index(i)]]
    image_positions = start + np.arange(n)
    key_positions = reference.as_frames(image_positions, grid)[:, ::stride, ::stride].flatten()
    frames = reference.as_frames(image_positions, grid)[..., 0]
    stands_for = [
        sum(1 for y in range(row, min(row + stride, frame.shape[0])) for x in range(column, min(column + stride, frame.shape[1])))
        for frame in frames
        for row in range(0, frame.shape[0], stride)
        for column in range(0, frame.shape[1], stride)
    ]
    times = [*(stands_for if balanced and counted else [1] * len(stands_for)), *[1] * len(counted)]

    q_image, k_image, v_image = (of(module, image, grid) for of in maps)
    q_other, k_other, v_other = (reference.project(module, which, others) for which in range(3))
    size = channels // module.heads
    rows = np.zeros((n + len(others), channels))
    for head in range(module.heads):
        own = slice(head * size, (head + 1) * size)
        group = head * module.key_heads // module.heads
        shared = slice(group * size, (group + 1) * size)

        def turned(x: Array, positions: Sequence[int] | Array, norm: nn.Module) -> Array:
            x = reference.rms(x, norm)
            return reference.rope(x, np.asarray(positions)) if rotary and len(x) else x

        queries = [
            *zip(image_positions, turned(q_image[:, own], image_positions, module.norm_q), strict=True),
            *zip(other_positions, turned(q_other[:, own], other_positions, module.norm_q), strict=True),
        ]
        keys = [*turned(k_image[:, shared], key_positions, module.norm_k)]
        keys += [turned(k_other[:, shared], other_positions, module.norm_k)[i] for i in counted]
        values = [*v_image[:, shared], *(v_other[i, shared] for i in counted)]
        for position, q in queries:
            weights = [n * weigh(q, k) for n, k in zip(times, keys, strict=True)]
            rows[position, own] = reference.weighted(weights, np.array(values))
    return reference.linear(module.to_out, rows)


def converted(design: str, config: dict[str, Any], *, video: bool = False, padded: bool = False, **options: Any) -> nn.Module:
    """A toy of one block in float64, all of whose parameters have moved from their start."""
    torch.manual_seed(0)
    joint = options.get("joint", False)
    model = toy.shaken((Clip(**options) if video else toy.Toy(CHANNELS, blocks=1, **options)).eval())
    example = clip((3, 4, 6), joint) if video else toy.inputs(text=5 if joint else None, padded=padded)
    student = ec.linearize(model, ec.LinearizeConfig(rules=[ec.Rule("*attn", design, config)]), example)
    (site,) = ec.plan_of(student)
    assert site.action == design
    return toy.shaken(student, seed=1, amount=0.2).double()


def check(
    design: str,
    config: dict[str, Any],
    options: dict[str, Any],
    maps: Maps,
    weigh: Callable[[Array, Array], float],
    *,
    stride: int = 1,
    balanced: bool = False,
) -> None:
    """Compare a converted toy's attention with the loops, on two grids that the convolutions do not divide alike.

    To 1e-10 of the output's scale; to 1e-5 behind tables of RoPE, which are float32.
    """
    student = converted(design, config, **options)
    video, joint, padded = (options.get(name, False) for name in ("video", "joint", "padded"))
    rotary = options.get("rope", video)
    attention = (student.block if video else student.blocks[0]).attn
    for grid in ((2, 3, 4), (3, 5, 3)) if video else ((4, 6), (5, 3)):
        seen: list[Any] = []
        handle = attention.register_forward_hook(lambda module, args, output, seen=seen: seen.extend((args, output)))
        given = clip(grid, joint) if video else toy.inputs(3, 2 * grid[0], 2 * grid[1], 4 if joint else None, seed=2, padded=padded)
        with torch.no_grad():
            student(**{name: x.double() if x.is_floating_point() else x for name, x in given.items()})
        handle.remove()
        for sample, output in enumerate(seen[1].numpy()):
            image, text = [x[sample].numpy() if x is not None else None for x in (*seen[0], None)[:2]]
            counts = given["text_mask"][sample].numpy() if padded else None
            more = {"stride": stride, "rotary": rotary, "counts": counts, "balanced": balanced}
            wanted = site(attention, image, text, grid, maps, weigh, **more)
            np.testing.assert_allclose(output, wanted, atol=(1e-5 if rotary else 1e-10) * np.abs(wanted).max(), rtol=0)


def check_conversion(design: str, config: dict[str, Any], hand: Callable[[int, int, int], int]) -> nn.Module:
    """Convert a toy with text through the public face; its FLOPs are counted by hand, beside the teacher's without softmax attention.

    Args:
        hand: the FLOPs of one site on a grid (h, w) with that many other tokens.
    """
    torch.manual_seed(0)
    model = toy.shaken(toy.Toy(CHANNELS, blocks=2, joint=True, qk_norm=True).eval())
    student = ec.linearize(model, ec.LinearizeConfig(design=design, **config), toy.inputs(text=5))
    attention = [found for found in ec.plan_of(student) if found.kind == "attention"]
    assert [found.action for found in attention] == [design] * 2
    assert ec.audit(student).sites == 2
    with torch.no_grad():
        for given in (toy.inputs(text=5), toy.inputs(1, 6, 18, 3)):
            original, found = model(**given), student(**given)
            assert found.isfinite().all()
            assert (found - original).abs().max() > 1e-5
            with ec.teacher(student):
                torch.testing.assert_close(student(**given), original, atol=1e-5, rtol=0)
    for h, w in ((4, 6), (7, 5), (8, 12)):
        softmax = 4 * CHANNELS * (h * w + 5) ** 2
        assert flops(student, h, w) - flops(model, h, w) == 2 * (hand(h, w, 5) - softmax)
    return student


def check_linear(student: nn.Module) -> None:
    """The FLOPs of a converted toy with text grow by the same number with each further part of an image."""
    first, second, third = (flops(student, 8 * parts, 6) for parts in (1, 2, 3))
    assert third - second == second - first


@torch.no_grad()
def flops(model: nn.Module, h: int, w: int) -> int:
    """Count the FLOPs of a toy with five text tokens on a grid (h, w)."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused kernel
        model(**toy.inputs(1, 2 * h, 2 * w, 5))
    return counter.get_total_flops()
