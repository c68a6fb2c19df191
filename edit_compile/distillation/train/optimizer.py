"""The optimizer, its learning rate as a function of the step, and the moving average of the weights."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.distillation.recipe.schema import LayerwiseFit, OptimizerConfig, Stage
from edit_compile.distillation.train.distributed import to_local
from edit_compile.errors import DistillError
from edit_compile.torch_internals import lerp_all_


def learning_rate(step: int, phase: Stage | LayerwiseFit) -> float:
    """Compute the rate of a step, counted from 0: a linear warmup to `lr`, then half a cosine down to `min_lr_ratio` of it."""
    warmup = min(phase.warmup_steps, phase.steps - 1)
    if step < warmup:
        return phase.lr * (step + 1) / (warmup + 1)
    passed = (step - warmup) / (phase.steps - warmup)
    return phase.lr * (phase.min_lr_ratio + (1 - phase.min_lr_ratio) * (0.5 + 0.5 * math.cos(math.pi * passed)))


def make_optimizer(parameters: Mapping[str, nn.Parameter], options: OptimizerConfig) -> torch.optim.Optimizer:
    """Make AdamW; the learning rate is set at every step.

    Raises:
        DistillError: the 8-bit one is asked for and bitsandbytes is not installed.
    """
    common: dict[str, Any] = {"lr": 0.0, "betas": options.betas, "weight_decay": options.weight_decay, "eps": options.eps}
    if options.kind == "adamw":
        return torch.optim.AdamW(list(parameters.values()), fused=True, **common)
    try:
        bitsandbytes = importlib.import_module("bitsandbytes.optim")
    except ImportError:
        raise DistillError("optimizer.kind: adamw-8bit needs bitsandbytes: pip install bitsandbytes") from None
    optimizer: torch.optim.Optimizer = bitsandbytes.AdamW8bit(list(parameters.values()), **common)
    return optimizer


def slots_of(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> dict[str, Any]:
    """Flatten what an optimizer keeps for its parameters to `name/slot`. The names are in the order of its parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    named = zip(names, parameters, strict=True)
    return {f"{name}/{slot}": value for name, p in named for slot, value in optimizer.state.get(p, {}).items()}


def set_slots(optimizer: torch.optim.Optimizer, names: Iterable[str], slots: Mapping[str, Any]) -> None:
    """Set what `slots_of` returned."""
    by_name: dict[str, dict[str, Any]] = {}
    for key, value in slots.items():
        name, _, slot = key.rpartition("/")
        by_name.setdefault(name, {})[slot] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        if name in by_name:
            optimizer.state[parameter] = by_name[name]


class MovingAverage:
    """The exponential moving average of parameters, with decay min(decay, (1 + n) / (10 + n)) at its n-th update."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.updates = dict(parameters), decay, 0
        self.average: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        average, now = ([to_local(t) for t in tensors.values()] for tensors in (self.average, self.parameters))
        lerp_all_(average, now, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Set the parameters to the average for good."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.average[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Set the parameters to the average inside."""
        held = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.copy_to_parameters()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(held[name])
