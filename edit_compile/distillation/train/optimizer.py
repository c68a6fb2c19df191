"""The optimizer, its learning rate as a function of the step, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.distillation.recipe.schema import LayerwiseFit, OptimizerConfig, Stage
from edit_compile.distillation.train.distributed import local
from edit_compile.errors import DistillError


def learning_rate(step: int, phase: Stage | LayerwiseFit) -> float:
    """Linear warm-up to `lr`, then half a cosine down to `lr_end` of it. Steps count from 0."""
    warmup = min(phase.warmup_steps, phase.steps - 1)
    if step < warmup:
        return phase.lr * (step + 1) / (warmup + 1)
    passed = (step - warmup) / (phase.steps - warmup)
    return phase.lr * (phase.min_lr_ratio + (1 - phase.min_lr_ratio) * (0.5 + 0.5 * math.cos(math.pi * passed)))


def make_optimizer(parameters: Mapping[str, nn.Parameter], options: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW; the rate is set at every step.

    Raises:
        DistillError: the 8-bit one is asked for and bitsandbytes is not installed.
    """
    common: dict[str, Any] = {"lr": 0.0, "betas": options.betas, "weight_decay": options.weight_decay, "eps": options.eps}
    if options.kind == "adamw":
        return torch.optim.AdamW(list(parameters.values()), fused=True, **common)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise DistillError("optimizer.kind: adamw-8bit needs bitsandbytes: pip install bitsandbytes") from None
    return AdamW8bit(list(parameters.values()), **common)


def slots_of(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> dict[str, Any]:
    """What an optimizer keeps for its parameters, flat: `name/slot`. The names are in the order of its parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    named = zip(names, parameters, strict=True)
    return {f"{name}/{slot}": value for name, p in named for slot, value in optimizer.state.get(p, {}).items()}


def set_slots(optimizer: torch.optim.Optimizer, names: Iterable[str], slots: Mapping[str, Any]) -> None:
    """The inverse of `slots_of`."""
    by_name: dict[str, dict[str, Any]] = {}
    for key, value in slots.items():
        name, _, slot = key.rpartition("/")
        by_name.setdefault(name, {})[slot] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        if name in by_name:
            optimizer.state[parameter] = by_name[name]


class MovingAverage:
    """The exponential moving average of parameters: decay min(decay, (1 + n) / (10 + n)) at its n-th update."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.updates = dict(parameters), decay, 0
        self.average: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        average, now = ([local(t) for t in tensors.values()] for tensors in (self.average, self.parameters))
        torch._foreach_lerp_(average, now, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Let the parameters be the average for good."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.average[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters are the average."""
        held = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.copy_to_parameters()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(held[name])
