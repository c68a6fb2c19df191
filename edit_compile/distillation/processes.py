"""What processes that work together tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # of processes for the first one, which encodes alone; that it is alive is watched: see `peers`


@dataclass
class Waits:
    """How many blocks of code this process is in that say what they wait for: see `train.movement`."""

    for_others: int = 0
    may_be_long: int = 0


waits = Waits()


@contextmanager
def waiting_for_others() -> Iterator[None]:
    """Say that the other processes must come to where this one is: a device's collective operation is waited for at what reads it."""
    waits.for_others += 1
    try:
        yield
    finally:
        waits.for_others -= 1


@contextmanager
def taking_time() -> Iterator[None]:
    """Say that this process waits for something slow that is not of the run, such as an upload, and does not hang."""
    waits.may_be_long += 1
    try:
        yield
    finally:
        waits.may_be_long -= 1


def process() -> tuple[int, int]:
    """Return this process's rank, and how many processes there are."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def join_processes() -> torch.device:
    """Meet the processes that `accelerate launch` has started, if it has; returns this one's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    from accelerate import PartialState

    device: torch.device = PartialState(timeout=PATIENCE).device
    return device


def gathered(items: list[T]) -> list[T]:
    """Gather the items of all processes, by rank. All must call it."""
    count = process()[1]
    if count == 1:
        return items
    found: list[Any] = [None] * count
    torch.distributed.all_gather_object(found, items)
    return [item for items in found for item in items]


def in_all(act: Callable[[], T], failures: tuple[type[Exception], ...]) -> list[T]:
    """Do something in every process; returns what each gives, by rank. If it fails in one it fails in all. All must call it.

    Args:
        failures: the errors that are told to the other processes.

    Raises:
        OSError: it failed in another process; says in which and why.
    """
    if process()[1] == 1:
        return [act()]
    given: list[T] = []
    failed: Exception | None = None
    try:
        given = [act()]
    except failures as error:
        failed = error
    outcomes = gathered([(given, None if failed is None else str(failed))])
    if failed is not None:
        raise failed
    for other, (_, reason) in enumerate(outcomes):
        if reason is not None:
            raise OSError(f"process {other}: {reason}")
    return [value for values, _ in outcomes for value in values]
