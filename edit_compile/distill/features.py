"""What the converted sites give out, by forward hooks: the teacher's and the student's sites have the same paths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from edit_compile.sites import converted_sites

Features = dict[str, list[Tensor]]
_SMALLEST = 1e-12


@contextmanager
def recorded(student: nn.Module) -> Iterator[Features]:
    """Inside, the outputs of every converted site are kept in the dictionary given, by path.

    Recomputation under gradient checkpointing happens after, and leaves it as it is.
    """
    found: Features = {}
    handles = [site.register_forward_hook(_keeper(found, path)) for path, site in converted_sites(student).items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _keeper(found: Features, path: str) -> Any:
    def hook(site: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.setdefault(path, []).extend(tensors_of(output))

    return hook


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors of a site's output."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def relative_error(found: list[Tensor], expected: list[Tensor]) -> Tensor:
    """sum |found - expected|^2 / sum |expected|^2 of every sample, (B,) float32.

    Relative to the expected energy, sites count alike; by sample, the mean over a batch does not depend on how the
    batch is divided.
    """
    differences = [energy(a.float() - b.float()) for a, b in zip(found, expected, strict=True)]
    return torch.stack(differences).sum(0) / torch.stack([energy(b.float()) for b in expected]).sum(0).clamp(min=_SMALLEST)


def energy(x: Tensor) -> Tensor:
    """The sum of squares of every sample, (B, ...) to (B,)."""
    return x.square().flatten(1).sum(1)
