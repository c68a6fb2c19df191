"""A run's folder: what is in it, whether it can be resumed, and what is left at the end."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from edit_compile.distillation.output.data_record import DATA_FILE
from edit_compile.distillation.processes import in_all
from edit_compile.distillation.recipe.schema import FREE, Recipe, changes_in_words, flatten
from edit_compile.distillation.train.checkpoints import Checkpoint, CheckpointMetadata, list_checkpoints, load_newest, remove_after
from edit_compile.distillation.train.metrics import MetricsRow
from edit_compile.errors import DistillError, some_of
from edit_compile.files import naming, write_text
from edit_compile.frozen import dump_except, first_problem
from edit_compile.student.checkpoint_format import INDEX
from edit_compile.version import made_by_another

# What must not be taken for a later run's. What others measured of the student says which one that was.
_OF_A_RUN = ("result.json", INDEX, "README.md", "losses.png", "report.html")
_FOLDERS_OF_A_RUN = ("checkpoints", "samples", "trackers")
_BEGUN = {"recipe.yaml", "metrics.jsonl", DATA_FILE, *_FOLDERS_OF_A_RUN}  # what a run may leave before its first checkpoint


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
        if self.metrics.exists() and _BEGUN.issuperset(names):
            return None  # a recipe alone may be its author's
        return f"is not empty ({some_of(names)}):" if names else None

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
        rows = self.rows() if total and self.metrics.exists() else []
        kept = [row for row in rows if row["total"] <= total]
        write_text(self.metrics, "".join(map(_line, kept)))  # says that this is a run
        write_text(self.path / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))

    def rows(self) -> list[MetricsRow]:
        """Read all rows of metrics but those that are damaged."""
        lines = self.metrics.read_bytes().splitlines(keepends=True)
        return [row for line in lines if line.endswith(b"\n") and (row := _row(line)) is not None]

    def images(self) -> list[Path]:
        """List the loss plot and the last sample grid, relative to the folder."""
        samples = sorted((self.path / "samples").glob("*.png"))
        return [path.relative_to(self.path) for path in [self.path / "losses.png", *samples[-1:]] if path.exists()]

    def add(self, row: MetricsRow) -> None:
        """Append a row of metrics."""
        with naming(self.metrics), self.metrics.open("a") as file:
            file.write(_line(row))

    def finish(self, result: dict[str, Any], model_card: str) -> None:
        """Write the model card and the result, and remove the checkpoints."""
        write_text(self.path / "README.md", model_card)
        write_text(self.result, json.dumps(result, indent=2))
        shutil.rmtree(self.checkpoints, ignore_errors=True)


def _line(row: MetricsRow) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _row(line: bytes) -> MetricsRow | None:
    """Read a row of metrics: numbers by name, one of them the total of steps, and the phase; None if it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("total")) is not int or row["total"] < 0:
        return None
    sound = all(isinstance(value, str) if name == "phase" else _is_number(value) for name, value in row.items())
    return row if sound else None


def _is_number(value: Any) -> bool:
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))
