"""Triton kernels against what Inductor makes of the same formulas, on the device at hand: whether `edit_compile.compile` uses them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.bench.turns import repeats_of, time_in_turns
from edit_compile.designs.ops.feature_maps import elu_plus_one
from edit_compile.designs.ops.kernels.choice import (
    Comparison,
    KernelCase,
    can_run,
    cases_in,
    conditions,
    function_of,
    keep,
    known_comparison,
)
from edit_compile.designs.ops.linear_attention import linear_attention
from edit_compile.designs.ops.token_spans import to_image
from edit_compile.errors import first_line
from edit_compile.progress import working
from edit_compile.student.handle import unwrap
from edit_compile.torch_internals import allow_graphs

SIDES = (128, 256)  # of the grids of image tokens at which kernels are compared: at smaller ones launches take longer than the work
_RUNS, _GRAPHS = 7, 64
_MAPS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "elu": elu_plus_one}


def measure_kernels(student: Any) -> list[Comparison]:
    """Measure the Triton kernels of a converted model's modules against Inductor's forms of the same formulas, each kind once.

    It takes seconds to a minute a kind, and is kept in the user's cache folder by device, type of numbers and versions;
    `edit_compile.compile` uses a kernel where it was the faster one, and as exact. On a CPU, or without Triton, there is none to measure.

    Args:
        student: a converted model on the device that it is to run on, or what holds one: a pipeline, DDP, PEFT.

    Returns:
        What was measured, now or before.
    """
    found: dict[str, Comparison] = {}
    for _, case, weight in cases_in(unwrap(student)):
        name = str(conditions(case, weight))
        if can_run(weight.device) and name not in found:
            found[name] = known_comparison(case, weight) or _measured(case, weight)
    return list(found.values())


def _measured(case: KernelCase, weight: Tensor) -> Comparison:
    with working(f"measuring a kernel, {case.operator} {' x '.join(map(str, case.sizes))}, against Inductor's"):
        try:
            comparison = compare(case, weight)
        except torch.OutOfMemoryError as error:  # another time there may be room
            return Comparison(conditions=conditions(case, weight), problem=first_line(error))
        except Exception as error:  # of a compiler: this device does without the kernel
            comparison = Comparison(conditions=conditions(case, weight), problem=f"{type(error).__name__}: {first_line(error)}")
    keep(comparison)
    return comparison


@torch.no_grad()
def compare(case: KernelCase, weight: Tensor, sides: tuple[int, ...] = SIDES, runs: int = _RUNS, **options: Any) -> Comparison:
    """Compare a kernel with Inductor's form, at some square sizes.

    Args:
        weight: has the device and the type of numbers.
        options: of torch.compile.
    """
    form = _forms(case, weight)
    calls = {"kernel": form.kernel, "inductor": form.formula}
    options = allow_graphs({"fullgraph": True, "dynamic": True, **options}, _GRAPHS)
    compiled = {name: torch.compile(call, **options) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    errors = dict.fromkeys(calls, 0.0)
    for side in sides:
        inputs = form.inputs(side)
        here = {name: partial(call, *inputs) for name, call in compiled.items()}
        if side == min(sides):
            exact = form.exact(*(x.double() for x in inputs))
            errors = {name: ((call().double() - exact).norm() / exact.norm()).item() for name, call in here.items()}
        repeats = {name: repeats_of(call, weight.device) for name, call in here.items()}
        for name, times in time_in_turns(here, weight.device, runs=runs, repeats=repeats).items():
            seconds[name].append(median(times))
    return Comparison(
        conditions=conditions(case, weight),
        kernel=tuple(seconds["kernel"]),
        inductor=tuple(seconds["inductor"]),
        kernel_error=errors["kernel"],
        inductor_error=errors["inductor"],
    )


@dataclass(frozen=True)
class _Forms:
    """What a kernel computes in both ways, in float64 too, and inputs as a model's projections give them."""

    kernel: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    inputs: Callable[[int], list[Tensor]]


def _forms(case: KernelCase, weight: Tensor) -> _Forms:
    return _linear(case, weight) if case.operator == "linear_attention" else _depthwise(case, weight)


def _linear(case: KernelCase, weight: Tensor) -> _Forms:
    assert case.features is not None
    function, to_features, (heads, d, e) = function_of(case), _MAPS[case.features], case.sizes

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Tensor = function(q, k, v, None, case.features)[0]
        return y

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(to_features(q), to_features(k), v)[0]

    def inputs(side: int) -> list[Tensor]:
        sizes = ((side**2, d), (side**2 // 4, d), (side**2 // 4, e))
        q, k, v = (torch.unflatten(_random(weight, 1, n, heads * size), 2, (heads, size)).transpose(1, 2) for n, size in sizes)
        return [q, k, v]

    return _Forms(kernel, formula, formula, inputs)


def _depthwise(case: KernelCase, weight: Tensor) -> _Forms:
    channels, stride = case.sizes
    conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, device=weight.device, dtype=weight.dtype)

    def inputs(side: int) -> list[Tensor]:
        return [to_image(_random(weight, 1, side**2, channels), (side, side))]

    function = function_of(case)

    def kernel(image: Tensor) -> Tensor:
        y: Tensor = function(conv, image)
        return y

    return _Forms(kernel, conv, copy.deepcopy(conv).double(), inputs)


def _random(like: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, device=like.device, dtype=like.dtype)
