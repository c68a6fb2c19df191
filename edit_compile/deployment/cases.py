"""The inputs that an exported file is made from and compared with, and which of their dimensions may vary."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from edit_compile.adapters.family import Extent
from edit_compile.adapters.inputs import default_sizes, inputs_for_size, pixels_per_token
from edit_compile.errors import ConfigError, GridError
from edit_compile.ir.plan import SizesOfInputs
from edit_compile.passes.capture import meta_inputs
from edit_compile.student.grid import grid_of_inputs
from edit_compile.student.handle import ConvertedModel, plan_of

GRID = "image_grid"  # the further input of models whose grid no graph can read from the others: any tensor of the grid's shape
NAMES = ("batch", "frames", "height", "width", "text")  # what dimensions may be named after
DEFAULT = ("batch", "frames", "height", "width")
_BATCH, _MOST = 2, 4  # samples of the first case, and multiples of a token that are tried as another height or width
_STEPS = {"frames": (1, 0, 0), "height": (0, 1, 0), "width": (0, 0, 1)}  # in which a size grows
Varying = dict[tuple[int, int], tuple[str, ...]]  # what a dimension varies with, by the number of its tensor among the inputs


@dataclass(frozen=True)
class Case:
    """Keyword arguments of one forward, and what they are in words."""

    name: str
    inputs: dict[str, Any]


def needs_grid(student: ConvertedModel) -> bool:
    """Say whether a graph cannot find the grid of image tokens in the model's own inputs."""
    return not isinstance(plan_of(student).grid, SizesOfInputs)


def tensors_of(inputs: Any) -> list[Tensor]:
    """List the tensors of inputs, in the order in which an exported file takes them."""
    return [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]


def input_names(inputs: Mapping[str, Any]) -> list[str]:
    """Name the tensors of inputs as a call reads them: `hidden_states`, `sizes[0]`."""
    found = pytree.tree_flatten_with_path(dict(inputs))[0]
    return [f"{path[0].key}{pytree.keystr(path[1:])}" for path, leaf in found if isinstance(leaf, Tensor)]  # type: ignore[attr-defined]


def split_constants(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part arguments that hold tensors from those that hold none, and are the file's own."""
    tensors = {name: value for name, value in inputs.items() if tensors_of(value)}
    return tensors, {name: value for name, value in inputs.items() if name not in tensors}


def plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments without tensors as a file holds them: in JSON, which has no tuples."""
    found: dict[str, Any] = json.loads(json.dumps(dict(arguments), default=repr))
    return found


@dataclass(frozen=True)
class Cases:
    """What a file is made from and compared with.

    Attributes:
        captured: what files are made from: no size in it is a special one.
        all: what they are compared at.
        varying: of its dimensions.
        impossible: names of what does not vary alone, and why.
        variants: the shapes of tensors, as captured but for what a name says.
    """

    captured: Case
    all: tuple[Case, ...]
    varying: Varying
    impossible: dict[str, str]
    variants: dict[str, list[tuple[int, ...]]]


def given_cases(student: ConvertedModel, examples: Sequence[Mapping[str, Any]]) -> Cases:
    """Take inputs as they are given: what differs between them varies.

    Raises:
        GridError: the grid does not follow from them, and is not given.
        ConfigError: they are not alike.
    """
    cases = tuple(Case(f"example {number + 1}", _with_grid(student, dict(inputs))) for number, inputs in enumerate(examples))
    first, *others = cases
    varying: Varying = {}
    for other in others:
        varying |= difference(first.inputs, other.inputs, "size")
    variants = {"size": _shapes(others[-1].inputs)} if others else {}
    return Cases(first, cases, varying, {}, variants)


def _with_grid(student: ConvertedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    if not needs_grid(student) or GRID in inputs:
        return inputs
    grids = grid_of_inputs(student, inputs)
    if grids is None:
        raise GridError(
            f"{type(student).__name__}: the grid of its image tokens does not follow from these inputs: "
            f"give it with them, {GRID}=torch.empty(height, width)"
        )
    return {**inputs, GRID: as_input(grids[0])} if len(grids) == 1 else _several(student)


def _several(student: ConvertedModel) -> Any:
    raise GridError(f"{type(student).__name__}: several images in one sequence cannot be exported; give inputs with one")


def as_input(grid: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Make the tensor that stands for a grid: its shape is the grid's, its content is never read."""
    return torch.zeros(tuple(grid), dtype=torch.uint8, device=device)


class SizedCases:
    """Makes inputs of known models at sizes in pixels."""

    def __init__(self, student: ConvertedModel) -> None:
        self.student = student
        weight = next(p for p in student.parameters() if p.is_floating_point())
        self.device, self.dtype = weight.device, weight.dtype

    def make(self, sizes: Sequence[Extent] | None, chosen: Collection[str]) -> Cases:
        """Make a case for each size, in batches of two and one by turns if these may vary.

        Args:
            chosen: names of what is to vary.

        Raises:
            GridError: the model does not support a size; says why.
            NoExampleInputsError: no adapter knows the model.
        """
        numbers = self._given_as_numbers(sizes[0] if sizes else self._two_sizes(False)[0])
        chosen = set(chosen) - numbers.keys()
        is_open = {"height", "width"} <= chosen
        sizes = tuple(sizes or self._two_sizes(is_open))
        if {"height", "width"} & numbers.keys() and len(set(sizes)) > 1:
            raise GridError(f"{type(self.student).__name__}: a file holds for one size: {numbers.get('height') or numbers['width']}")
        captured = self._unlike(sizes[0]) if is_open else sizes[0]
        varying, impossible, variants = self._varying(captured, numbers)
        cases = []
        for number, size in enumerate(sizes):
            batch = 1 if number % 2 and "batch" in chosen else _BATCH
            with _seeded():
                cases.append(Case(f"{' x '.join(map(str, size))} px, batch {batch}", self._inputs(size, batch, real=True)))
        with _seeded():
            inputs = self._inputs(captured, _BATCH, real=True)
        return Cases(Case("", inputs), tuple(cases), varying, impossible, variants)

    def _unlike(self, size: Extent) -> Extent:
        """Return a size near another at which no model takes a shortcut of its own, as for the size that it was trained at."""
        *frames, height, width = size
        step = pixels_per_token(self.student)
        others = [(*frames, height - step, width + step), (*frames, height - step, width - step)]
        return next((other for other in others if self._is_possible(other)), size)

    def _two_sizes(self, is_open: bool) -> tuple[Extent, Extent]:
        """Return the smallest size that the model is usually used at, and one of another shape if that may vary and the model allows it.

        Raises:
            GridError: it does not support its usual size.
        """
        usual, *_ = sorted(default_sizes(self.student), key=math.prod)
        self._inputs(usual, 1)
        *frames, height, width = usual
        step = pixels_per_token(self.student)
        lower, wider = max(step, height * 3 // 4 // step * step), width * 5 // 4 // step * step
        others = [(*frames, lower, wider), (*frames, lower, lower)] if is_open else []
        return usual, next((size for size in others if self._is_possible(size)), usual)

    def _is_possible(self, size: Extent) -> bool:
        try:
            self._inputs(size, 1)
        except GridError:
            return False
        return True

    def _inputs(self, size: Extent, batch: int, *, more_text: int = 0, real: bool = False) -> dict[str, Any]:
        *frames, height, width = size
        device = self.device if real else torch.device("meta")
        options: dict[str, Any] = {"frames": frames[0] if frames else None, "batch": batch, "device": device, "dtype": self.dtype}
        made = inputs_for_size(self.student, height, width, **options)
        if more_text:
            made = inputs_for_size(self.student, height, width, text=made.text + more_text, **options)
        inputs = made.inputs if real else meta_inputs(made.inputs, None)
        return {**inputs, GRID: as_input(made.grid, device)} if needs_grid(self.student) else inputs

    def _given_as_numbers(self, size: Extent) -> dict[str, str]:
        """Tell which sizes the model takes as numbers, too, which a file has fixed, and in which argument."""
        first, step = self._inputs(size, _BATCH), pixels_per_token(self.student)
        found = {}
        for name, inputs in (
            ("batch", self._inputs(size, _BATCH + 1)),
            *((name, self._larger_inputs(size, direction, step)) for name, direction in _STEPS.items()),
        ):
            constants = [] if inputs is None else [key for key, value in split_constants(inputs)[1].items() if value != first.get(key)]
            if constants:
                found[name] = f"it is a number in {constants[0]}"
        return found

    def _larger_inputs(self, size: Extent, direction: Sequence[int], step: int) -> dict[str, Any] | None:
        larger = self._larger(size, tuple(direction[-len(size) :]), step)
        return None if isinstance(larger, str) else self._inputs(larger, _BATCH)

    def _varying(self, size: Extent, numbers: Mapping[str, str]) -> tuple[Varying, dict[str, str], dict[str, list[tuple[int, ...]]]]:
        """Find out what each dimension varies with, from inputs that differ in one thing; returns their shapes, too."""
        first = self._inputs(size, _BATCH)
        found: Varying = {}
        impossible = dict(numbers)
        variants: dict[str, Any] = {"batch": (size, _BATCH + 1, 0), "text": (size, _BATCH, 1)}
        if "batch" in numbers:
            del variants["batch"]
        step = pixels_per_token(self.student)
        for name, direction in _STEPS.items():
            if name in numbers or (name == "frames" and len(size) == 2):
                continue
            larger = self._larger(size, tuple(direction[-len(size) :]), step)
            if isinstance(larger, str):
                impossible[name] = larger
            else:
                variants[name] = (larger, _BATCH, 0)
        if {"height", "width"} <= impossible.keys() - numbers.keys():
            square = self._larger(size, (0, 1, 1)[-len(size) :], step)
            if not isinstance(square, str):  # both at once: neither is told from the other
                del impossible["height"], impossible["width"]
                variants["height"] = variants["width"] = (square, _BATCH, 0)
        shapes = {}
        for name, (other, batch, text) in variants.items():
            inputs = self._inputs(other, batch, more_text=text)
            shapes[name] = _shapes(inputs)
            for place, names in difference(first, inputs, name).items():
                found[place] = (*found.get(place, ()), *names)
        return found, impossible, shapes

    def _larger(self, size: Extent, direction: Sequence[int], step: int) -> Extent | str:
        """Return a size that is larger in a direction, or why there is none."""
        reason = ""
        for times in range(1, _MOST + 1):
            changed = tuple(
                side + times * more * (1 if place < len(size) - 2 else step)
                for place, (side, more) in enumerate(zip(size, direction, strict=True))
            )
            try:
                self._inputs(changed, 1)
            except GridError as error:
                reason = reason or str(error)
            else:
                return changed
        return reason


def _shapes(inputs: Mapping[str, Any]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors_of(split_constants(inputs)[0])]


def difference(first: Mapping[str, Any], other: Mapping[str, Any], name: str) -> Varying:
    """Find the dimensions in which inputs differ.

    Raises:
        ConfigError: they differ in other ways.
    """
    (ones, spec), (others, other_spec) = pytree.tree_flatten(dict(first)), pytree.tree_flatten({key: other.get(key) for key in first})
    if spec != other_spec or first.keys() != other.keys():
        raise ConfigError(f"example inputs must be alike but for sizes: {', '.join(first)} and {', '.join(other)}")
    found: Varying = {}
    number = 0
    for one, another in zip(ones, others, strict=True):
        if not isinstance(one, Tensor):
            if isinstance(another, Tensor) or one != another:
                raise ConfigError(f"example inputs must be alike but for sizes of tensors: {one!r} and {another!r}")
            continue
        if not isinstance(another, Tensor) or one.ndim != another.ndim or one.dtype != another.dtype:
            raise ConfigError(f"example inputs must be alike but for sizes: {input_names(first)[number]} differs in more")
        found |= {(number, dim): (name,) for dim, (a, b) in enumerate(zip(one.shape, another.shape, strict=True)) if a != b}
        number += 1
    return found


@contextmanager
def _seeded() -> Iterator[None]:
    """Make the same random inputs every time inside, without a trace in torch's generators."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def device_of(student: nn.Module) -> torch.device:
    """Return the device of a model's weights."""
    return next(student.parameters()).device


def fits(tensors: Sequence[Tensor], shapes: Sequence[Sequence[int | str]], dtypes: Sequence[str]) -> bool:
    """Say whether tensors are as they were described: sizes that are words may be any."""
    return len(tensors) == len(shapes) and all(
        str(tensor.dtype) == f"torch.{dtype}"
        and tensor.ndim == len(shape)
        and all(isinstance(size, str) or size == actual for size, actual in zip(shape, tensor.shape, strict=True))
        for tensor, shape, dtype in zip(tensors, shapes, dtypes, strict=True)
    )
