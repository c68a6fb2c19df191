"""The optimizer, its learning rate as a function of the step, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.api import repeated_blocks
from edit_compile.distillation.recipe.schema import LayerwiseFit, MuonOptions, OptimizerConfig, Stage
from edit_compile.distillation.train.distributed import to_local
from edit_compile.distillation.train.optimizer_class import (
    OURS,
    arguments_for,
    find_optimizer,
    kept_in_group,
    options_of,
    state_bytes_per_weight,
)
from edit_compile.errors import DistillError
from edit_compile.torch_internals import lerp_all_


def learning_rate(step: int, phase: Stage | LayerwiseFit) -> float:
    """Compute the rate of a step, counted from 0: a linear warmup to `lr`, then along the schedule down to `min_lr_ratio` of it."""
    warmup = phase.warmup
    if step < warmup:
        return phase.lr * (step + 1) / (warmup + 1)
    return phase.lr * (phase.min_lr_ratio + (1 - phase.min_lr_ratio) * _left_of_rate(phase, (step - warmup) / (phase.steps - warmup)))


def _left_of_rate(phase: Stage | LayerwiseFit, passed: float) -> float:
    """Compute what the schedules of diffusers' `get_scheduler` leave of the rate when a share of the steps after the warmup has passed."""
    if phase.lr_schedule in ("constant", "constant_with_warmup"):
        return 1.0
    if phase.lr_schedule in ("linear", "polynomial"):
        return float((1 - passed) ** (phase.lr_power or 1.0))
    return 0.5 + 0.5 * math.cos(math.pi * (passed * (phase.lr_cycles or 1) % 1.0))


GROUP = "group "  # begins the names of what optimizers keep for all of their parameters, which no parameter's does


class Optimizers:
    """One optimizer or several, each with parameters of its own; updates all of them as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer, ratios: Sequence[float] = ()) -> None:
        """
        Args:
            ratios: of the optimizers' learning rates to the recipe's; default: 1.
        """
        self.optimizers = optimizers
        self.ratios = tuple(ratios) or (1.0,) * len(optimizers)
        self._groups = {f"{GROUP}{i}.{j}": group for i, each in enumerate(optimizers) for j, group in enumerate(each.param_groups)}
        self._options = {name: options_of(group) for name, group in self._groups.items()}

    def step(self, rate: float) -> None:
        """Update the parameters at a learning rate."""
        for optimizer, ratio in zip(self.optimizers, self.ratios, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * ratio
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def slots(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
        """Flatten what is kept for the parameters, given by name, and in their groups to `name/slot`."""
        names = {id(p): name for name, p in parameters.items()}
        kept = (item for optimizer in self.optimizers for item in optimizer.state.items())
        found = {f"{names[id(p)]}/{slot}": value for p, slots in kept for slot, value in slots.items()}
        order = {name: number for number, name in enumerate(parameters)}
        return dict(sorted(found.items(), key=lambda item: order[item[0].rpartition("/")[0]])) | self._kept_in_groups()

    def _kept_in_groups(self) -> dict[str, Any]:
        """List what optimizers keep beside their options: those that find their own learning rate keep it there."""
        kept = ((name, key, value) for name, group in self._groups.items() for key, value in kept_in_group(group, self._options[name]))
        return {f"{name}/{key}": value for name, key, value in kept}

    def set_slots(self, parameters: Mapping[str, nn.Parameter], slots: Mapping[str, Any]) -> None:
        """Set what `slots` returned."""
        by_name: dict[str, dict[str, Any]] = {}
        for key, value in slots.items():
            name, _, slot = key.rpartition("/")
            by_name.setdefault(name, {})[slot] = value
        owners = {id(p): optimizer for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        for name, group in self._groups.items():
            device = group["params"][0].device
            for key, value in by_name.pop(name, {}).items():
                restored = value.to(device) if isinstance(value, Tensor) else value
                group[key] = bool(restored) if isinstance(group.get(key), bool) else restored
        for name, kept in by_name.items():
            owners[id(parameters[name])].state[parameters[name]] = kept


def make_optimizers(student: nn.Module, parameters: Mapping[str, nn.Parameter], options: OptimizerConfig) -> Optimizers:
    """Make the optimizer of a student's trained parameters; the learning rate is given at every step.

    Raises:
        DistillError: it is not installed, does not take one of its options, or is Muon, and there is nothing for it.
    """
    if options.kind != "muon":
        found = find_optimizer(options.kind)
        return Optimizers(found(list(parameters.values()), **_arguments(found, options)))
    common: dict[str, Any] = {"lr": 0.0, "weight_decay": options.weight_decay}
    matrices, chosen = muon_matrices(student, parameters), options.muon or MuonOptions()
    muon = torch.optim.Muon(
        list(matrices.values()),
        momentum=chosen.momentum,
        nesterov=chosen.nesterov,
        ns_steps=chosen.ns_steps,
        adjust_lr_fn=chosen.adjust_lr.replace("-", "_"),
        **common,
    )
    rest = [p for name, p in parameters.items() if name not in matrices]
    others = [torch.optim.AdamW(rest, fused=True, betas=options.betas, eps=options.eps, **common)] if rest else []
    return Optimizers(muon, *others, ratios=(chosen.lr_ratio, *[1.0] * len(others)))


def _arguments(found: type[torch.optim.Optimizer], options: OptimizerConfig) -> dict[str, Any]:
    """Return what an optimizer is made with: AdamW, in 8 bits too, with its own keys; others with what the recipe's `options` say alone."""
    ours = {"betas": options.betas, "weight_decay": options.weight_decay, "eps": options.eps} if options.kind in OURS else {}
    fused = {"fused": True} if options.kind == "adamw" else {}
    return {"lr": 0.0, **fused, **ours, **arguments_for(found, options.options)}


def check_optimizer(options: OptimizerConfig) -> None:
    """Find out whether an optimizer can be made and can make a step.

    Raises:
        DistillError: as `make_optimizers`; or it cannot.
    """
    if options.kind != "muon":
        found = find_optimizer(options.kind)
        state_bytes_per_weight(found, _arguments(found, options))


def muon_matrices(student: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Select what Muon updates: the weights of Linears inside the repeated blocks, not the model's first and last layers.

    Raises:
        DistillError: there are none among the parameters.
    """
    blocks = tuple(f"{path}." for path in repeated_blocks(student))
    weights = {f"{path}.weight" for path, module in student.named_modules() if isinstance(module, nn.Linear)}
    found = {name: p for name, p in parameters.items() if name in weights and name.startswith(blocks) and p.ndim == 2}
    if not found:
        raise DistillError("optimizer.kind: muon has nothing to do: none of what is trained is the weight of a Linear; choose adamw")
    return found


def moment_bytes(student: nn.Module, parameters: Mapping[str, nn.Parameter], options: OptimizerConfig) -> int:
    """Count the bytes of the moments that the optimizer keeps of the parameters, without making it.

    Raises:
        DistillError: as `make_optimizers`.
    """
    each = 8.0  # two moments
    if options.kind not in OURS:
        found = find_optimizer(options.kind)
        each = state_bytes_per_weight(found, _arguments(found, options))
    elif options.kind == "adamw-8bit":
        each = 2.0
    matrices = muon_matrices(student, parameters).values() if options.kind == "muon" else ()
    return round(each * sum(p.numel() for p in parameters.values())) - 4 * sum(p.numel() for p in matrices)  # Muon has one


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
