"""A run's folder: what is in it, whether it can be continued, and what is left at the end."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from edit_compile.distillation.recipe.schema import Recipe, flatten
from edit_compile.distillation.train.checkpoints import State, checkpoints, read_state
from edit_compile.distillation.train.metrics import Row
from edit_compile.errors import DistillError
from edit_compile.files import write_text

# What may differ when a run is continued: it changes nothing about the result, `micro_batch` nothing but its rounding.
_FREE = (
    "micro_batch_size",
    "save_every",
    "keep_last",
    "log_every",
    "max_skipped_steps",
    "trackers",
    "samples.every",
    "samples.count",
    "samples.steps",
)


@dataclass(frozen=True)
class RunFolder:
    """`recipe.yaml`, `metrics.jsonl`, `result.json` once finished, and until then `checkpoints/`."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    def samples(self, total: int) -> Path:
        """The sample grid drawn after so many steps."""
        return self.path / "samples" / f"{total:08d}.png"

    def open(self, recipe: Recipe, *, resume: bool, writes: bool) -> tuple[State, dict[str, Tensor]] | None:
        """What to continue from, or None to begin.

        Args:
            writes: whether this process may change the folder.

        Raises:
            DistillError: the folder holds another run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise DistillError(f"{self.path} is a file; a run needs a folder")
        if not resume and checkpoints(self.checkpoints) and not self.result.exists():
            raise DistillError(f"{self.path} holds an unfinished run: continue it with --resume, remove it, or choose another folder")
        if resume and self.result.exists():
            raise DistillError(f"{self.path} holds a finished run: there is nothing to resume")
        restored = read_state(self.checkpoints) if resume else None
        if restored is not None:
            self._check_recipe(recipe, restored[0])
        if writes:
            self._prepare(recipe, restored[0].total if restored is not None else 0)
        return restored

    def _check_recipe(self, recipe: Recipe, state: State) -> None:
        now, then = (flatten(content) for content in (recipe.model_dump(mode="json"), state.recipe))
        different = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key) and not key.endswith(_FREE))
        if different:
            changes = ", ".join(f"{key} ({then.get(key)} then, {now.get(key)} now)" for key in different[:3])
            raise DistillError(f"{self.path} was begun with another recipe: {changes}; resume with the same, or choose another folder")

    def _prepare(self, recipe: Recipe, total: int) -> None:
        """Leave what belongs to the first `total` steps."""
        self.path.mkdir(parents=True, exist_ok=True)
        if total == 0:
            self.result.unlink(missing_ok=True)
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        rows = self.metrics.read_text().splitlines(keepends=True) if total and self.metrics.exists() else []
        kept = [row for row in rows if row.endswith("\n") and json.loads(row)["total"] <= total]
        write_text(self.metrics, "".join(kept))
        write_text(self.path / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))

    def rows(self) -> list[Row]:
        """All rows of metrics."""
        return [json.loads(line) for line in self.metrics.read_text().splitlines()]

    def pictures(self) -> list[Path]:
        """The loss plot and the last sample grid, relative to the folder."""
        samples = sorted((self.path / "samples").glob("*.png"))
        return [path.relative_to(self.path) for path in [self.path / "losses.png", *samples[-1:]] if path.exists()]

    def add(self, row: Row) -> None:
        """Append a row of metrics."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def finish(self, result: dict[str, Any], card: str) -> None:
        """Note the result and the model card; what was there to resume from goes."""
        write_text(self.path / "README.md", card)
        write_text(self.result, json.dumps(result, indent=2))
        shutil.rmtree(self.checkpoints, ignore_errors=True)
