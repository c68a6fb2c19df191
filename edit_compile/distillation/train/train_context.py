"""Context managers for training-time state, which is restored on exit."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def only_trainable(student: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Let only the parameters of these names require gradients inside."""
    before = {name: p.requires_grad for name, p in student.named_parameters()}  # merging LoRA inside renames weights
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in names)
    try:
        yield
    finally:
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(before.get(name, parameter.requires_grad))
            parameter.grad = None


@contextmanager
def own_random_state(device: torch.device) -> Iterator[None]:
    """Let torch's random numbers be seeded inside without a trace outside."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
