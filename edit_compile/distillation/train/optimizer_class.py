"""Optimizers by name: torch's own, bitsandbytes' 8-bit ones, and those of other packages."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from edit_compile.errors import DistillError, suggestion

OURS = ("adamw", "adamw-8bit", "muon")  # whose options have names of their own in recipes
EIGHT_BIT = "-8bit"
_OTHERS = ("LBFGS", "SparseAdam", "Muon", "Optimizer")  # call the model again, need sparse gradients, or are made elsewhere
_TRIAL = 256  # side of the matrix that an optimizer is tried with


def torch_optimizers() -> tuple[str, ...]:
    """List the names of torch's optimizers that can train any parameters."""
    found = (kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer))
    return tuple(sorted(kind.__name__.lower() for kind in found if kind.__name__ not in _OTHERS))


def known_kind(kind: str) -> str:
    """Return the kind of an optimizer if it can be one, without importing other packages; otherwise raise a ValueError."""
    if kind.endswith(EIGHT_BIT) or "." in kind or kind in ("muon", *torch_optimizers()):
        return kind
    known = (*OURS, *(name for name in torch_optimizers() if name not in OURS))
    raise ValueError(f"unknown optimizer; {suggestion(kind, known)}, others of bitsandbytes as NAME-8bit, or package.Class")


def find_optimizer(kind: str) -> type[torch.optim.Optimizer]:
    """Find the class of an optimizer.

    Raises:
        DistillError: its package is not installed, or has no such optimizer.
    """
    if kind.endswith(EIGHT_BIT):
        return _eight_bit(kind)
    module_name, _, name = kind.rpartition(".")
    if not module_name:
        return next(each for each in vars(torch.optim).values() if getattr(each, "__name__", "").lower() == kind and isinstance(each, type))
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise DistillError(f"optimizer.kind: {kind} cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise DistillError(f"optimizer.kind: {kind} is not a torch.optim.Optimizer")
    return found


def _eight_bit(kind: str) -> type[torch.optim.Optimizer]:
    try:
        module = importlib.import_module("bitsandbytes.optim")
    except ImportError:
        raise DistillError(f"optimizer.kind: {kind} needs bitsandbytes: pip install bitsandbytes") from None
    found = {name.lower(): each for name, each in vars(module).items() if name.endswith("8bit") and isinstance(each, type)}
    if kind.replace("-", "") not in found:
        names = [f"{name.removesuffix('8bit')}{EIGHT_BIT}" for name in sorted(found)]
        raise DistillError(f"optimizer.kind: bitsandbytes has no {kind}; {suggestion(kind, names)}")
    return found[kind.replace("-", "")]


def arguments_for(optimizer: type[torch.optim.Optimizer], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an optimizer is made with.

    Raises:
        DistillError: it does not take one of them.
    """
    parameters = inspect.signature(optimizer).parameters
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    if unknown := [name for name in wanted if name not in parameters and not takes_all]:
        takes = [name for name in parameters if name not in ("params", "lr")]
        raise DistillError(f"optimizer: {optimizer.__name__} does not take {unknown[0]}; {suggestion(unknown[0], takes)}")
    return dict(wanted)


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Copy what one of an optimizer's groups holds besides parameters and their learning rate."""
    return copy.deepcopy({key: value for key, value in group.items() if key not in ("params", "lr")})


def kept_in_group(group: Mapping[str, Any], options: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """List what an optimizer keeps in one of its groups: tensors, and what is not as it was when it was made.

    Args:
        options: what `options_of` gave then.
    """
    own = ((key, value) for key, value in group.items() if key not in ("params", "lr"))
    return [(key, value) for key, value in own if isinstance(value, torch.Tensor) or key not in options or value != options[key]]


def state_bytes_per_weight(optimizer: type[torch.optim.Optimizer], arguments: Mapping[str, Any]) -> float:
    """Make one step with a matrix, and count the bytes that the optimizer keeps for each of its weights.

    Raises:
        DistillError: it cannot be made with these arguments, cannot make a step, or keeps what a checkpoint cannot hold.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"  # some have kernels for CUDA alone
    weight = torch.nn.Parameter(torch.zeros(_TRIAL, _TRIAL, device=device))
    weight.grad = torch.full_like(weight, 1e-3)
    try:
        made = optimizer([weight], **arguments)
        options = options_of(made.param_groups[0])
        made.step()
    except Exception as error:  # of whatever package it is
        raise DistillError(f"optimizer: {optimizer.__name__} cannot be used: {type(error).__name__}: {error}") from error
    slots = made.state[weight] | dict(kept_in_group(made.param_groups[0], options))
    if strange := [name for name, value in slots.items() if not isinstance(value, torch.Tensor | int | float)]:
        raise DistillError(
            f"optimizer: {optimizer.__name__} keeps {strange[0]!r}, neither a tensor nor a number: a checkpoint cannot hold it"
        )
    kept = [value for value in made.state[weight].values() if isinstance(value, torch.Tensor) and value.numel() > 1]
    return sum(value.numel() * value.element_size() for value in kept) / weight.numel()
