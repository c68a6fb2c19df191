"""The outputs of the converted sites: the teacher's and the student's sites have the same paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from edit_compile.student.handle import conversion_of
from edit_compile.student.runtime import Outputs, Statement
from edit_compile.student.site import converted_sites

Features = dict[str, list[Tensor | None]]  # a site's tensors by its path; None for weights that linear attention does not have
_SMALLEST = 1e-12


@contextmanager
def captured(model: nn.Module) -> Iterator[Features]:
    """Run the model inside; after that the dictionary holds the tensors that each site returned, by path.

    Calls in other threads and tasks are not captured. Nor are the outputs of sites that run again in a backward pass.
    """
    outputs = Outputs()
    found: Features = {path: [] for path in converted_sites(model)}
    with conversion_of(model).runtime.stating(Statement(outputs=outputs)):
        try:
            yield found
        finally:
            kept = outputs.take()  # also after an error: a reference from here would keep the graph
    for site, output in kept:
        found[site.edit_path] += tensors_of(output)


def tensors_of(output: Any) -> list[Tensor | None]:
    """List the floating-point tensors in a site's output, and None in the place of one that only the other of two models gives."""
    leaves = pytree.tree_leaves(output, is_leaf=lambda leaf: leaf is None)
    return [leaf for leaf in leaves if leaf is None or (isinstance(leaf, Tensor) and leaf.is_floating_point())]


def relative_error(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> Tensor:
    """Compute sum |found - expected|^2 / sum |expected|^2 of every sample, (B,) float32.

    Relative to the expected energy, sites count alike; by sample, the mean over a batch does not depend on how the
    batch is divided.
    """
    pairs = [(a.float(), b.float()) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
    differences = torch.stack([energy(a - b) for a, b in pairs]).sum(0)
    return differences / torch.stack([energy(b) for _, b in pairs]).sum(0).clamp(min=_SMALLEST)


def energy(x: Tensor) -> Tensor:
    """Sum up the squares of every sample, (B, ...) to (B,)."""
    return x.square().flatten(1).sum(1)
