"""A run's folder: what is in it, whether it can be resumed, and what is left at the end."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from edit_compile.distillation.processes import in_all
from edit_compile.distillation.recipe.schema import FREE, Recipe, changes_in_words, flatten
from edit_compile.distillation.train.checkpoints import Checkpoint, CheckpointMetadata, list_checkpoints, load_newest, remove_after
from edit_compile.distillation.train.metrics import MetricsRow
from edit_compile.errors import DistillError, some_of
from edit_compile.files import write_text
from edit_compile.frozen import dump_except, first_problem
from edit_compile.student.checkpoint_format import INDEX
from edit_compile.version import made_by_another

# What must not be taken for a later run's. What others measured of the student says which one that was.
_OF_A_RUN = ("result.json", INDEX, "README.md", "losses.png", "report.html")
_FOLDERS_OF_A_RUN = ("checkpoints", "samples", "trackers")


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

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse a folder in which a run would destroy something, before anything is loaded.

        Raises:
            DistillError: it has a run, or other files.
        """
        if resume and self.result.exists():
            raise DistillError(f"{self.path} has a finished run: there is nothing to resume")
        found = None if overwrite else self._holds(resume=resume)
        if found is not None:
            raise DistillError(f"{self.path} {found} replace it with --overwrite (overwrite=), or choose another folder")

    def _holds(self, *, resume: bool) -> str | None:
        """Say what a folder holds that a run would destroy, and what to do about it; None if nothing."""
        if self.result.exists():
            return "has a finished run:"
        if list_checkpoints(self.checkpoints):
            return None if resume else "has an unfinished run: continue it with --resume,"
        if (self.path / INDEX).exists():
            return "holds a converted model:"
        names = sorted(path.name for path in self.path.glob("[!.]*"))
        if names and not (self.path / "recipe.yaml").exists():
            return f"is not empty ({some_of(names)}):"
        return None

    def open(self, recipe: Recipe, *, resume: bool, writes: bool) -> Checkpoint | None:
        """Find what to continue from, or None to begin; then nothing of another run is left. All processes must call this, after `check`.

        Args:
            writes: whether this process may change the folder.

        Raises:
            DistillError: the run in the folder was begun with another recipe, or by another version.
        """
        checkpoint = load_newest(self.checkpoints) if resume else None
        if checkpoint is not None:
            self._check_recipe(recipe, checkpoint[0])
        total = checkpoint[0].total if checkpoint is not None else 0
        in_all(lambda: self._prepare(recipe, total) if writes else None, (OSError,))
        return checkpoint

    def _check_recipe(self, recipe: Recipe, metadata: CheckpointMetadata) -> None:
        try:
            begun = Recipe.model_validate(metadata.recipe)
        except ValidationError as error:
            made = made_by_another(metadata.package_version)
            raise DistillError(f"{self.path} was {made}, which cannot read its recipe: {first_problem(error)}") from None
        (mark,) = FREE
        now, then = (flatten(dump_except(one, mark)) for one in (recipe, begun))
        changes = changes_in_words(then, now)
        if changes:
            raise DistillError(f"{self.path} was begun with another recipe: {changes}; resume with the same one, or choose another folder")

    def _prepare(self, recipe: Recipe, total: int) -> None:
        """Keep only what belongs to the first `total` steps."""
        self.path.mkdir(parents=True, exist_ok=True)
        if total == 0:
            for name in _OF_A_RUN:
                (self.path / name).unlink(missing_ok=True)
            for name in _FOLDERS_OF_A_RUN:
                shutil.rmtree(self.path / name, ignore_errors=True)
        remove_after(self.checkpoints, total)
        rows = self.metrics.read_text().splitlines(keepends=True) if total and self.metrics.exists() else []
        kept = [row for row in rows if row.endswith("\n") and 0 <= _total(row) <= total]
        write_text(self.path / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))  # says that this is a run
        write_text(self.metrics, "".join(kept))

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


def _total(row: str) -> int:
    """Return the number of steps that a row of metrics is about; -1 if the row is damaged."""
    try:
        found = json.loads(row)["total"]
    except (ValueError, KeyError, TypeError):
        return -1
    return found if isinstance(found, int) else -1
