"""The outputs of the converted sites: the teacher's and the student's sites have the same paths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from edit_compile.student.handle import conversion_of
from edit_compile.student.runtime import Outputs, Statement
from edit_compile.student.site import converted_sites

Features = dict[str, list[Tensor]]  # a site's tensors by its path
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


def tensors_of(output: Any) -> list[Tensor]:
    """List the floating-point tensors in a site's output."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def relative_error(found: list[Tensor], expected: list[Tensor]) -> Tensor:
    """Compute sum |found - expected|^2 / sum |expected|^2 of every sample, (B,) float32.

    Relative to the expected energy, sites count alike; by sample, the mean over a batch does not depend on how the
    batch is divided.
    """
    differences = [energy(a.float() - b.float()) for a, b in zip(found, expected, strict=True)]
    return torch.stack(differences).sum(0) / torch.stack([energy(b.float()) for b in expected]).sum(0).clamp(min=_SMALLEST)


def energy(x: Tensor) -> Tensor:
    """Sum up the squares of every sample, (B, ...) to (B,)."""
    return x.square().flatten(1).sum(1)
