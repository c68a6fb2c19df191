"""What the converted sites give out, by forward hooks: the teacher's and the student's sites have the same paths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from edit_compile.student.grid import Runtime, runtime_of
from edit_compile.student.site import converted_sites

Features = dict[str, list[Tensor]]  # a site's tensors by its path
_KEPT, _KEY = "_edit_kept", -1
_SMALLEST = 1e-12


@contextmanager
def recording(model: nn.Module) -> Iterator[None]:
    """Inside, `recorded` works.

    One function is the hook of all sites, under one key (registering would number them), and what it keeps is an attribute
    of the site: so blocks that are equal stay equal to torch.compile, which must meet the hooks before it compiles.
    """
    hooks = [site._forward_hooks for site in converted_sites(model).values()]
    for of_site in hooks:
        of_site[_KEY] = _keep
    try:
        yield
    finally:
        for of_site in hooks:
            del of_site[_KEY]


@contextmanager
def recorded(model: nn.Module) -> Iterator[Features]:
    """Run the model inside; after that the dictionary holds the tensors that each site gave out, by path."""
    runtime, sites = runtime_of(model), converted_sites(model)
    found: Features = {}
    for site in sites.values():
        site.__dict__[_KEPT] = ()
    runtime.recording = True
    try:
        yield found
        found |= {path: tensors_of(site.__dict__[_KEPT]) for path, site in sites.items()}
    finally:
        runtime.recording = False
        for site in sites.values():
            del site.__dict__[_KEPT]


@contextmanager
def recording_again(block: nn.Module, runtime: Runtime, on: bool) -> Iterator[None]:
    """For a block that is computed again in a backward pass: recording is on or off as it was in its forward, for compiled code
    differs by it. What sites give out is dropped.
    """
    sites = converted_sites(block).values()
    for site in sites:
        site.__dict__[_KEPT] = ()
    runtime.recording = on
    try:
        yield
    finally:
        runtime.recording = False
        for site in sites:
            del site.__dict__[_KEPT]


def _keep(site: Any, args: tuple[Any, ...], output: Any) -> None:
    if site.edit_runtime.recording:
        site._edit_kept = (*site._edit_kept, output)


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors in a site's output."""
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
