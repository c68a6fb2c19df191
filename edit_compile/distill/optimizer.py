"""The optimizer, its learning rate as a function of the step, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from edit_compile.distill.recipe import Optimizer, Stage, WarmStart


def learning_rate(step: int, phase: Stage | WarmStart) -> float:
    """Linear warm-up to `lr`, then half a cosine down to `lr_end` of it. Steps count from 0."""
    warm_up = min(phase.warm_up, phase.steps - 1)
    if step < warm_up:
        return phase.lr * (step + 1) / (warm_up + 1)
    passed = (step - warm_up) / (phase.steps - warm_up)
    return phase.lr * (phase.lr_end + (1 - phase.lr_end) * (0.5 + 0.5 * math.cos(math.pi * passed)))


def make_optimizer(parameters: Mapping[str, nn.Parameter], options: Optimizer) -> torch.optim.AdamW:
    """AdamW; the rate is set at every step."""
    betas, decay, eps = options.betas, options.weight_decay, options.eps
    return torch.optim.AdamW(list(parameters.values()), lr=0.0, betas=betas, weight_decay=decay, eps=eps)


class MovingAverage:
    """The exponential moving average of parameters: decay min(decay, (1 + n) / (10 + n)) at its n-th update."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.updates = dict(parameters), decay, 0
        self.average: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Let the parameters be the average for good."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.average[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters are the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            held = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(held)
