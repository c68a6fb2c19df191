"""Metrics as JSON lines: one row an interval, averaged over its steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]


class Average:
    """The mean of losses over steps, kept on the device until asked for."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, losses: Mapping[str, Tensor]) -> None:
        for name, loss in losses.items():
            self.sums[name] = self.sums[name] + loss if name in self.sums else loss
        self.steps += 1

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means, reduced over processes, and start again."""
        names, steps = list(self.sums), self.steps
        values = reduce(torch.stack([self.sums[name].float() for name in names]) / max(steps, 1)).tolist() if names else []
        self.sums, self.steps = {}, 0
        return dict(zip(names, values, strict=True))


class JsonLines:
    """Appends rows to a file, each complete on the disk before the next."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: Row) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
