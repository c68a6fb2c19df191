"""A run's folder: what is in it, whether it can be resumed, and what is left at the end."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from edit_compile.distillation.recipe.schema import FREE, Recipe, changed_keys, flatten
from edit_compile.distillation.train.checkpoints import Checkpoint, CheckpointMetadata, list_checkpoints, load_newest
from edit_compile.distillation.train.metrics import MetricsRow
from edit_compile.errors import DistillError
from edit_compile.files import write_text
from edit_compile.frozen import dump_except, first_problem
from edit_compile.version import __version__


@dataclass(frozen=True)
class RunFolder:
    """`recipe.yaml`, `metrics.jsonl`, `result.json` once finished, and until then `checkpoints/`."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The file of the metrics' rows."""
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Path:
        """The file that says that the run is finished."""
        return self.path / "result.json"

    def samples(self, total: int) -> Path:
        """Return the file of the sample grid after a number of steps."""
        return self.path / "samples" / f"{total:08d}.png"

    def open(self, recipe: Recipe, *, resume: bool, writes: bool) -> Checkpoint | None:
        """Find what to continue from, or None to begin.

        Args:
            writes: whether this process may change the folder.

        Raises:
            DistillError: the folder has another run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise DistillError(f"{self.path} is a file; a run needs a folder")
        if not resume and list_checkpoints(self.checkpoints) and not self.result.exists():
            raise DistillError(f"{self.path} has an unfinished run: continue it with --resume, remove it, or choose another folder")
        if resume and self.result.exists():
            raise DistillError(f"{self.path} has a finished run: there is nothing to resume")
        checkpoint = load_newest(self.checkpoints) if resume else None
        if checkpoint is not None:
            self._check_recipe(recipe, checkpoint[0])
        if writes:
            self._prepare(recipe, checkpoint[0].total if checkpoint is not None else 0)
        return checkpoint

    def _check_recipe(self, recipe: Recipe, metadata: CheckpointMetadata) -> None:
        try:
            begun = Recipe.model_validate(metadata.recipe)
        except ValidationError as error:
            maker = f"made by version {metadata.package_version} of edit_compile, this is version {__version__}"
            raise DistillError(f"{self.path} was {maker}, which cannot read its recipe: {first_problem(error)}") from None
        (mark,) = FREE
        now, then = (flatten(dump_except(one, mark)) for one in (recipe, begun))
        different = changed_keys(then, now)
        if different:
            changes = ", ".join(f"{key} ({then.get(key)} then, {now.get(key)} now)" for key in different[:3])
            raise DistillError(f"{self.path} was begun with another recipe: {changes}; resume with the same one, or choose another folder")

    def _prepare(self, recipe: Recipe, total: int) -> None:
        """Keep only what belongs to the first `total` steps."""
        self.path.mkdir(parents=True, exist_ok=True)
        if total == 0:
            self.result.unlink(missing_ok=True)
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        rows = self.metrics.read_text().splitlines(keepends=True) if total and self.metrics.exists() else []
        kept = [row for row in rows if row.endswith("\n") and json.loads(row)["total"] <= total]
        write_text(self.metrics, "".join(kept))
        write_text(self.path / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))

    def rows(self) -> list[MetricsRow]:
        """Read all rows of metrics."""
        return [json.loads(line) for line in self.metrics.read_text().splitlines()]

    def images(self) -> list[Path]:
        """List the loss plot and the last sample grid, relative to the folder."""
        samples = sorted((self.path / "samples").glob("*.png"))
        return [path.relative_to(self.path) for path in [self.path / "losses.png", *samples[-1:]] if path.exists()]

    def add(self, row: MetricsRow) -> None:
        """Append a row of metrics."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def finish(self, result: dict[str, Any], model_card: str) -> None:
        """Write the model card and the result, and remove the checkpoints."""
        write_text(self.path / "README.md", model_card)
        write_text(self.result, json.dumps(result, indent=2))
        shutil.rmtree(self.checkpoints, ignore_errors=True)
