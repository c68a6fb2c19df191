"""What a conversion costs and saves: FLOPs counted on the meta device, parameters added. No weights, no memory.

A FLOP is a multiplication or an addition in a matrix product, a convolution or attention; pointwise work is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edit_compile.adapters.inputs import picture_inputs, pixels_per_token, usual_sizes
from edit_compile.api import plan_of, repeated_blocks, teacher
from edit_compile.errors import GridError
from edit_compile.passes.capture import meta_inputs, stand_in
from edit_compile.passes.native_attention import native_attention
from edit_compile.passes.rewrite import ADDED
from edit_compile.passes.structural_hash import structure_key
from edit_compile.student.grid import grid


@dataclass(frozen=True)
class FlopCount:
    """Of one forward: the whole model, and the submodules that were asked for."""

    total: int
    parts: Mapping[str, int]


@dataclass(frozen=True)
class SiteCost:
    """FLOPs of one rewritten site in one forward, projections included."""

    path: str
    before: int
    after: int


@dataclass(frozen=True)
class Cost:
    """One forward, batch 1, at one picture size.

    Attributes:
        height, width: in pixels.
        image, text: numbers of tokens.
        before, after: FLOPs of the whole model.
        sites: FLOPs of each rewritten site.
    """

    height: int
    width: int
    image: int
    text: int
    before: int
    after: int
    sites: tuple[SiteCost, ...]

    @property
    def saved(self) -> int:
        return self.before - self.after

    @property
    def ratio(self) -> float:
        return self.before / self.after


@dataclass(frozen=True)
class CostReport:
    """A conversion's costs over several picture sizes.

    Attributes:
        parameters, added: of the model before, and those the designs bring.
        costs: by picture size, ascending in image tokens.
        impossible: why a size could not be counted, by "height x width".
        pays_from: image tokens from which the conversion needs fewer FLOPs; 0 if at every size, None if unknown.
        pixels_per_token: each way.
    """

    parameters: int
    added: int
    costs: tuple[Cost, ...]
    impossible: Mapping[str, str]
    pays_from: int | None
    pixels_per_token: int


def count_flops(model: nn.Module, inputs: Mapping[str, Any], paths: Iterable[str] = (), blocks: Iterable[str] = ()) -> FlopCount:
    """FLOPs of `model(**inputs)`, all on the meta device.

    diffusers' native attention is counted whatever the caller's choice: other backends hide their products.

    Args:
        paths: submodules to count one by one.
        blocks: submodules of which equal ones, called with equal shapes, need run only once.
    """
    with _equal_blocks_run_once(model, blocks) as equal, torch.no_grad(), native_attention(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    counts = counter.get_flop_counts()

    def counted(path: str) -> int:
        return sum(counts.get(f"{type(model).__name__}.{path}", {}).values())

    total = counter.get_total_flops() + sum(counted(first) for first in equal.values())
    return FlopCount(total, {path: counted(_in_first(path, equal)) for path in paths})


def _in_first(path: str, equal: Mapping[str, str]) -> str:
    """Where a path in a block that was not run is found in the block that was."""
    block = next((block for block in equal if path == block or path.startswith(f"{block}.")), "")
    return equal[block] + path[len(block) :] if block else path


@contextmanager
def _equal_blocks_run_once(model: nn.Module, blocks: Iterable[str]) -> Iterator[dict[str, str]]:
    """Inside, a block equal to one that ran returns that one's output. Yields where each was skipped, and for which."""
    equal: dict[str, str] = {}
    seen: dict[Any, tuple[str, Any]] = {}
    modules = {path: model.get_submodule(path) for path in blocks}
    keys = {path: structure_key(module) for path, module in modules.items()}

    def run(path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        key = (keys[path], repr(pytree.tree_map(_shape, (args, kwargs))))
        if key in seen:
            equal[path] = seen[key][0]
        else:
            seen[key] = (path, forward(*args, **kwargs))
        return seen[key][1]

    own = {path: vars(module).get("forward") for path, module in modules.items()}
    try:
        for path, module in modules.items():
            module.forward = partial(run, path, module.forward)
        yield equal
    finally:
        for path, module in modules.items():
            del module.forward
            vars(module).update({"forward": own[path]} if own[path] is not None else {})


def _shape(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf


def added_parameters(student: nn.Module) -> int:
    """How many parameters the designs brought."""
    return sum(p.numel() for site in plan_of(student).rewritten for p in getattr(student.get_submodule(site.path), ADDED).parameters())


def conversion_cost(student: nn.Module, sizes: Sequence[tuple[int, int]] | None = None, *, text: int | None = None) -> CostReport:
    """Count a converted model against its teacher.

    Args:
        sizes: pictures' (height, width) in pixels; default: what users of the model care for.
        text: number of text tokens; default: as many as the model's pipeline passes.

    Raises:
        NoExampleInputsError: the model's family has no adapter.
    """
    structure = stand_in(student)
    costs: list[Cost] = []
    impossible: dict[str, str] = {}
    for height, width in sizes if sizes is not None else usual_sizes(student):
        try:
            costs.append(_cost(structure, height, width, text))
        except GridError as error:
            impossible[f"{height} x {width}"] = str(error)
    costs.sort(key=lambda cost: cost.image)
    added = added_parameters(student)
    total = sum(p.numel() for p in student.parameters())
    return CostReport(total - added, added, tuple(costs), impossible, pays_from(costs), pixels_per_token(student))


def _cost(structure: nn.Module, height: int, width: int, text: int | None) -> Cost:
    picture = picture_inputs(structure, height, width, text=text)
    inputs, paths, blocks = meta_inputs(picture.inputs), [site.path for site in plan_of(structure).rewritten], repeated_blocks(structure)
    with grid(structure, *picture.grid):
        after = count_flops(structure, inputs, paths, blocks)
    with teacher(structure):
        before = count_flops(structure, inputs, paths, blocks)
    sites = tuple(SiteCost(path, before.parts[path], after.parts[path]) for path in paths)
    return Cost(height, width, math.prod(picture.grid), picture.text, before.total, after.total, sites)


def pays_from(costs: Sequence[Cost]) -> int | None:
    """The number of image tokens where both need the same FLOPs.

    What is saved is a N^2 - b N: the quadratic part goes, a linear one comes; the rest of the model is the same. Two
    counts give a and b. With PAPER.md's softmax 4 N^2 C and convolutions 20 C^2 N / reduction the place is near 5 C / reduction.
    """
    counted = {cost.image: cost.saved / cost.image for cost in costs}
    if len(counted) < 2:
        return None
    few, many = min(counted), max(counted)
    slope = (counted[many] - counted[few]) / (many - few)
    return max(0, math.ceil(few - counted[few] / slope)) if slope > 0 else None
