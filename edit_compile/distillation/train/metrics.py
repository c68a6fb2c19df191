"""Rows of metrics: losses averaged over the steps of an interval."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from edit_compile.distillation.train.losses import loss_names

MetricsRow = dict[str, Any]


def losses_of(row: MetricsRow) -> str:
    """Format the losses and the speed of a row."""
    losses = [f"{name} {row[name]:.3g}" for name in ("loss", *loss_names()) if name in row]
    skipped = [f"{row['skipped']} skipped"] if row["skipped"] else []
    return "  ".join([*losses, *skipped, f"lr {row['lr']:.1e}", f"{row['samples_per_second']:.3g} samples/s"])


class Average:
    """The mean of losses over the steps that were taken, kept on the device until it is asked for, and how many were skipped."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = self.skipped = 0
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """The seconds since it was begun."""
        return time.monotonic() - self.began

    def add(self, losses: Mapping[str, Tensor]) -> None:
        for name, loss in losses.items():
            self.sums[name] = self.sums[name] + loss if name in self.sums else loss
        self.steps += 1

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Compute the means, reduced over processes."""
        names, steps = list(self.sums), self.steps
        values = reduce(torch.stack([self.sums[name].float() for name in names]) / max(steps, 1)).tolist() if names else []
        return dict(zip(names, values, strict=True))
