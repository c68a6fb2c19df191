"""A converted model in a file of its own, loaded as a function, and what the file says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from pydantic import ValidationError
from torch import Tensor

from edit_compile.deployment.cases import GRID, input_names, plain, split_constants, tensors_of
from edit_compile.deployment.formats import Run, format_of, parsed, quiet
from edit_compile.deployment.size_conditions import Equation, SizeConditions
from edit_compile.errors import ExportError, some_of
from edit_compile.frozen import Frozen, first_problem


class InputDescription(Frozen):
    """An input, a tensor."""

    name: str
    """As a call reads it: `hidden_states`, `sizes[0]`."""
    dtype: str
    shape: tuple[int | str, ...]
    """Sizes; where one may vary, what with: `batch`, `height`, `height and width`."""
    most: dict[int, int]
    """The largest sizes of dimensions that may vary, where they have one."""


class FileDescription(Frozen):
    """What a file knows of itself."""

    version: int = 1
    """Of this description."""
    edit_compile: str
    torch: str
    model: str
    """The class of the original."""
    base: str | None
    """Where the original was loaded from, if that is known."""
    designs: dict[str, int]
    """How many sites each design has."""
    format: str
    device: str
    inputs: tuple[InputDescription, ...]
    constants: dict[str, Any]
    """Arguments of the model's forward that are fixed in the file."""
    conditions: tuple[Equation, ...]
    """Equations of sizes that the file takes for granted."""
    varies: tuple[str, ...]
    """What of batch, frames, height, width and text may vary."""
    fixed: dict[str, str]
    """What does not, and why."""
    sizes: tuple[str, ...]
    """The sizes that it was made from, the first one, and compared at."""


class ExportedModel:
    """An exported file as a function of the model's keyword arguments.

    It can take the place of a pipeline's denoiser: `pipe.transformer.forward = edit_compile.load_exported("student.pt2")`.

    Attributes:
        about: what the file says of itself.
    """

    def __init__(self, path: Path, about: FileDescription, run: Run) -> None:
        self.path, self.about, self._run = path, about, run
        self._conditions, self._for_torch = SizeConditions(about.conditions), format_of(path).for_torch

    def __call__(self, **inputs: Any) -> tuple[Tensor, ...]:
        """Run the model.

        Args:
            inputs: of its forward, by name; those without a tensor may be left out.

        Returns:
            The tensors that the model gives out.

        Raises:
            ExportError: an input is missing or unknown, of another type, or of a size that is fixed; or an argument is not what the file
                was made with.
        """
        given, constants = split_constants(inputs)
        known, fixed = {each.name.partition("[")[0] for each in self.about.inputs}, self.about.constants
        for name, value in constants.items():
            if name in known:
                raise ExportError(f"{self.path.name} takes a tensor as {name}, not {value!r}")
            if plain({name: value}) != {name: fixed.get(name)}:
                raise ExportError(f"{self.path.name} was made with {name}={fixed.get(name)!r}, not {value!r}: export it again with that")
        tensors = dict(zip(input_names(given), tensors_of(given), strict=True))
        if missing := [each.name for each in self.about.inputs if each.name not in tensors]:
            hint = f"; {GRID} is a tensor of any content, shaped like the grid of image tokens" if GRID in missing else ""
            raise ExportError(f"{self.path.name} also takes {some_of(missing)}{hint}")
        if unknown := sorted(tensors.keys() - {each.name for each in self.about.inputs}):
            raise ExportError(f"{self.path.name} was made without {some_of(unknown)}: export it again with example inputs that have it")
        ordered = [tensors[each.name] for each in self.about.inputs]
        for each, tensor in zip(self.about.inputs, ordered, strict=True):
            self._check(each, tensor)
            self._check_device(each, tensor)
        if (broken := self._conditions.broken(ordered, [each.name for each in self.about.inputs])) is not None:
            raise ExportError(f"{self.path.name} takes sizes with {broken}")
        with torch.no_grad():
            return tuple(self._run([tensor.contiguous() for tensor in ordered]))

    def _check_device(self, described: InputDescription, tensor: Tensor) -> None:
        """Refuse a tensor that the file's code would read from where it is not; other programs than torch are given copies."""
        here, there = tensor.device.type, self.about.device if self._for_torch else "cpu"
        if here != there and (tensor.is_meta or self._for_torch):
            raise ExportError(f"{self.path.name} takes {described.name} on {there}, not on {here}")

    def _check(self, described: InputDescription, tensor: Tensor) -> None:
        fits = tensor.ndim == len(described.shape) and all(
            isinstance(size, str) or size == actual for size, actual in zip(described.shape, tensor.shape, strict=True)
        )
        if not fits or str(tensor.dtype) != f"torch.{described.dtype}":
            shape = ", ".join(map(str, described.shape))
            raise ExportError(
                f"{self.path.name} takes {described.name} as ({shape}) of {described.dtype}, not {tuple(tensor.shape)} of "
                f"{str(tensor.dtype).removeprefix('torch.')}"
            )
        for dim, most in described.most.items():
            if tensor.shape[dim] > most:
                raise ExportError(f"{self.path.name} takes {described.name}.shape[{dim}] up to {most}, not {tensor.shape[dim]}")


def load_exported(path: str | Path) -> ExportedModel:
    """Load a file that `export` wrote, as a function.

    Args:
        path: of a .pt2, .onnx or .pte file. A .pt2 file holds compiled code, which runs when it is loaded: load only your own.

    Raises:
        ExportError: it is no such file, or its format's packages are missing.
    """
    path = Path(path)
    kind = format_of(path)
    kind.check_packages()
    if not path.is_file():
        raise ExportError(f"{path}: there is no such file")
    try:
        with quiet():
            run, described = kind.read(path)
    except Exception as error:
        raise ExportError(
            f"{path} cannot be loaded as {kind.name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    try:
        return ExportedModel(path, FileDescription.model_validate(parsed(described, path)), run)
    except ValidationError as error:
        raise ExportError(f"{path} was written by another version of edit_compile: {first_problem(error)}") from None


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference between outputs, over the largest value that they should have.

    Raises:
        ExportError: they are of other shapes, or not finite.
    """
    if [tuple(each.shape) for each in found] != [tuple(each.shape) for each in expected]:
        raise ExportError(f"its outputs have the shapes {_shapes(found)}, the model's {_shapes(expected)}")
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        difference = (one.double().cpu() - other.double().cpu()).abs().max()
        worst = max(worst, float(difference / other.double().abs().max().cpu()) if torch.isfinite(difference) else float("inf"))
    return worst


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(str(tuple(each.shape)) for each in pytree.tree_leaves(list(tensors)))
