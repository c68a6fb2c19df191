"""Timing calls in turns: what disturbs one call of a round disturbs the others, too."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

Name = TypeVar("Name")
_LONG_ENOUGH = 0.003  # seconds that a timed call takes, or so many of it: less is lost in noise
_MOST_REPEATS = 200


@torch.no_grad()
def time_in_turns(
    calls: Mapping[Name, Callable[[], Any]],
    device: torch.device,
    *,
    runs: int,
    warmup: int = 2,
    repeats: Mapping[Name, int] | None = None,
    done: Callable[[], None] = lambda: None,
) -> dict[Name, list[float]]:
    """Time calls by turns, after a warm-up of all: the seconds of every call in every round.

    Args:
        repeats: how often a call is made each time, where that is not once; see `repeats_of`.
        done: called after each round.
    """
    for _ in range(warmup):
        for call in calls.values():
            call()
    found: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            found[name].append(seconds_of(call, device, (repeats or {}).get(name, 1)))
        done()
    return found


@torch.no_grad()
def repeats_of(call: Callable[[], Any], device: torch.device) -> int:
    """Find out how often a short call has to be made to be timed well."""
    call()
    return repeats_for(seconds_of(call, device))


def repeats_for(seconds: float) -> int:
    """Say how often a call that takes so long has to be made to be timed well."""
    return min(_MOST_REPEATS, math.ceil(_LONG_ENOUGH / max(seconds, 1e-7)))


def seconds_of(call: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Time a call, the mean of several."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def synchronize(device: torch.device) -> None:
    """Wait for what a device still has to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
