"""What is in force while a student is trained, and as before afterwards."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

_GRAPHS = 64


@contextmanager
def only_trainable(student: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Inside, nothing but the parameters of these names requires gradients."""
    before = {name: p.requires_grad for name, p in student.named_parameters()}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in names)
    try:
        yield
    finally:
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(before[name])
            parameter.grad = None


@contextmanager
def own_random_state(device: torch.device) -> Iterator[None]:
    """Inside, torch's random numbers may be seeded without a trace outside."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def room_for_graphs(*, compiled: bool) -> Iterator[None]:
    """Inside, torch.compile may keep more graphs of one block: teacher and student, with gradients and without, and the
    first and last block's own shapes are more than its limit of 8."""
    if not compiled:
        yield
        return
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=_GRAPHS):
        yield
