"""What a step is made of. Nothing here imports torch: the scheduler lists steps before it knows whether torch is there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]  # a name and a number, a text or None each: a line of a table


class NotDone(Exception):
    """A unit has saved where it is: it goes on in the next run."""


class Failed(Exception):
    """A unit has found that something is wrong, and what it found.

    Attributes:
        rows: of the table.
    """

    def __init__(self, message: str, rows: list[Row]) -> None:
        super().__init__(message)
        self.rows = rows


@dataclass
class Work:
    """What a unit is given.

    Attributes:
        out: the folder of results, with few and small files.
        folder: for what is kept between runs, of any size.
        tiny: whether this is a rehearsal: the same code at small sizes, on the CPU.
        until: when the step's time is over, on the monotonic clock.
        kept: what units of one process keep for each other.
    """

    out: Path
    folder: Path
    tiny: bool = False
    until: float = float("inf")
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        import torch

        return torch.device("cpu" if self.tiny else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """The type of numbers."""
        import torch

        return torch.float32 if self.tiny else torch.bfloat16

    @property
    def seconds_left(self) -> float:
        """Say how long the step may still take."""
        return self.until - time.monotonic()

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function for all sizes; in a rehearsal it is only traced."""
        import torch

        return torch.compile(function, fullgraph=True, dynamic=True, **self.compiler)

    @property
    def compiler(self) -> dict[str, str]:
        """Say which backend compiles: in a rehearsal none."""
        return {"backend": "eager"} if self.tiny else {}

    def kept_as(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what units keep under a name, made by the first that asks."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]


@dataclass(frozen=True)
class Unit:
    """A part of a step that is done as a whole, or not at all. It returns rows, or raises: `NotDone` if it goes on next time."""

    name: str
    run: Callable[[Work], list[Row]]


@dataclass(frozen=True)
class Step:
    """A step.

    Attributes:
        minutes: that it may take at a time.
        units: lists its units, given whether it is a rehearsal; in their order.
    """

    name: str
    what: str
    minutes: float
    units: Callable[[bool], list[Unit]]


def short(number: float) -> float:
    """Return a number, with four digits."""
    return float(f"{number:.4g}")


def in_ms(seconds: float) -> float:
    """Return milliseconds, with four digits."""
    return short(1000 * seconds)


def in_gib(number: float | None) -> float | None:
    """Return gibibytes, with four digits."""
    return None if number is None else short(number / 2**30)


@contextlib.contextmanager
def problem_in(row: Row, *, any_error: bool = False) -> Iterator[None]:
    """Note in a row that what is inside ran out of memory, or any other error, of a compiler too, which must not cost other rows."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        row["problem"] = f"out of memory: {str(error).splitlines()[0][:160]}"
        torch.cuda.empty_cache()
    except Exception as error:
        if not any_error:
            raise
        row["problem"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
