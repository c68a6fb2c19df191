"""Telling a base model by its weights: names, shapes, and a few values of every tensor.

Compared with the tolerance of half precision, so that a checkpoint made on float32 weights fits the same base in
float16 or bfloat16. A hash of rounded values would not do: rounding twice differs from rounding once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from edit_compile.torch_internals import is_quantized

_SAMPLES = 4
_RELATIVE, _ABSOLUTE = 1e-2, 1e-6
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8)
_CHUNK, _MIX = 2**16, 0x5851F42D4C957F2D  # words summed up at a time, within a cache; an odd number without a pattern
_LARGEST = 1e30  # in place of infinity, which JSON does not have


class TensorPrint(BaseModel):
    """A tensor's shape and a few of its values; without values for meta tensors, quantized ones and those that are not floating-point."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, ...]
    values: tuple[float, ...]


Fingerprint = dict[str, TensorPrint]


def fingerprint(state: Mapping[str, Tensor]) -> Fingerprint:
    """Take the fingerprint of a state dict."""
    return {name: TensorPrint(shape=tuple(tensor.shape), values=_samples(tensor)) for name, tensor in state.items()}


def _samples(tensor: Tensor) -> tuple[float, ...]:
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel() or is_quantized(tensor) or tensor.layout is not torch.strided:
        return ()
    places = [round(i * (tensor.numel() - 1) / (_SAMPLES - 1)) for i in range(_SAMPLES)]
    index = torch.unravel_index(torch.tensor(places), tensor.shape) if tensor.ndim else ()
    values = tensor.detach()[tuple(i.to(tensor.device) for i in index)].float().nan_to_num(0.0, _LARGEST, -_LARGEST)
    return tuple(float(f"{value:.4g}") for value in values.flatten().tolist())


def checksum(tensor: Tensor) -> int:
    """Add up a tensor's bits as 64-bit whole numbers, each mixed and weighted by its place, which comes out the same on every device."""
    flat = tensor.detach().flatten()
    if flat.storage_offset() or not flat.is_contiguous():
        flat = flat.clone(memory_format=torch.contiguous_format)  # or it might not be aligned for wider numbers, or repeat one
    size = flat.numel() * flat.itemsize
    words = flat.view(next(kind for kind in _WHOLE if size % kind.itemsize == 0))
    weights = torch.arange(1, 2 * min(len(words), _CHUNK) + 1, 2, device=tensor.device).mul_(_MIX)
    parts = [words[start : start + _CHUNK] for start in range(0, max(len(words), 1), _CHUNK)]
    sums = torch.stack([(_mixed(part) * weights[: len(part)]).sum() for part in parts]).tolist()
    return functools.reduce(lambda total, found: (total * _MIX + found) % 2**64, sums, 0)


def _mixed(words: Tensor) -> Tensor:
    """Let high bits count too: of a sum of products alone, two of them would cancel out."""
    wide = words.to(torch.int64)
    return wide ^ (wide >> 29)


def difference(expected: Fingerprint, found: Fingerprint) -> str | None:
    """Say in words how another model's fingerprint differs; None if it is the same model's."""
    for problem, names in (("it lacks", expected.keys() - found.keys()), ("only it has", found.keys() - expected.keys())):
        if names:
            return f"{problem} {min(names)}"
    for name, one in expected.items():
        other = found[name]
        if one.shape != other.shape:
            return f"its {name} has shape {other.shape}, not {one.shape}"
        if not close(one, other):
            return f"the values of its {name} differ"
    return None


def close(one: TensorPrint, other: TensorPrint, precision: float = 0.0) -> bool:
    """Compare the values of two tensors, as far as both have them.

    Args:
        precision: of the coarser dtype, where it is below that of half precision.
    """
    tolerance = max(_RELATIVE, precision)
    if not (one.values and other.values):
        return True
    pairs = zip(one.values, other.values, strict=False)
    return len(one.values) == len(other.values) and all(math.isclose(a, b, rel_tol=tolerance, abs_tol=_ABSOLUTE) for a, b in pairs)
